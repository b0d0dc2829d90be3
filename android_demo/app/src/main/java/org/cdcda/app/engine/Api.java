package org.cdcda.app.engine;

import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.util.Random;
import org.cdcda.app.engine.Answer.End;
import org.cdcda.app.engine.Answer.Timings;
import org.json.JSONArray;
import org.json.JSONException;
import org.json.JSONObject;

/** What a running llama-server is asked; a question's connection can be cut from another thread, which ends the answer there as well. */
final class Api {
    private static final int OK = 200;
    private static final int HEALTH_MILLIS = 5000;
    private static final String DATA = "data: ";
    /** Of the tokens that a benchmark reads; every vocabulary has these. */
    private static final int FIRST_TOKEN = 3;
    private static final int LAST_TOKEN = 250;

    private final Transport transport;
    private final File socket;
    private Transport.Connection open;
    private boolean cut;

    Api(Transport transport, File socket) {
        this.transport = transport;
        this.socket = socket;
    }

    /** Whether the model is loaded. */
    boolean isHealthy() {
        try (Transport.Connection connection = transport.open(socket)) {
            connection.setPatience(HEALTH_MILLIS);
            return Http.send(connection, "GET", "/health", "").status() == OK;
        } catch (IOException error) {
            return false;
        }
    }

    /** Answers, and gives the text as it comes. */
    Answer chat(Request request, Engine.Sink sink) throws IOException {
        try {
            JSONObject turn = new JSONObject().put("role", "user").put("content", request.text());
            JSONObject body = new JSONObject()
                    .put("messages", new JSONArray().put(turn))
                    .put("stream", true)
                    .put("max_tokens", request.tokens())
                    .put("temperature", request.temperature())
                    .put("lora", new JSONArray().put(new JSONObject().put("id", 0).put("scale", request.personal())));
            return ask("/v1/chat/completions", body, response -> stream(response.body(), sink));
        } catch (JSONException error) {
            throw new IOException(error);
        }
    }

    /** Reads random tokens and writes some. */
    Timings measure(int promptTokens, int answerTokens, Random chance) throws IOException {
        var prompt = new JSONArray();
        for (int at = 0; at < promptTokens; at++) {
            prompt.put(FIRST_TOKEN + chance.nextInt(LAST_TOKEN - FIRST_TOKEN));
        }
        try {
            JSONObject body = new JSONObject()
                    .put("prompt", prompt)
                    .put("n_predict", answerTokens)
                    .put("ignore_eos", true)
                    .put("cache_prompt", false)
                    .put("temperature", 0);
            Answer answer = ask("/completion", body, response -> {
                JSONObject said = new JSONObject(response.text());
                return new Answer(End.COMPLETE, "", timings(said.optJSONObject("timings")));
            });
            if (answer.end() != End.COMPLETE) {
                throw new IOException(answer.detail());
            }
            return answer.timings();
        } catch (JSONException error) {
            throw new IOException(error);
        }
    }

    /** Ends the question that is being answered, and the next one if none is: stop may come before the connection is open. */
    synchronized void cut() {
        cut = true;
        close(open);
    }

    /** Makes the next question possible again. */
    synchronized void mend() {
        cut = false;
    }

    synchronized boolean isCut() {
        return cut;
    }

    private interface Reader {
        Answer read(Http.Response response) throws IOException, JSONException;
    }

    private Answer ask(String path, JSONObject body, Reader reader) throws IOException, JSONException {
        try (Transport.Connection connection = transport.open(socket)) {
            synchronized (this) {
                if (cut) {
                    return new Answer(End.STOPPED, "", Timings.NONE);
                }
                open = connection;
            }
            Http.Response response = Http.send(connection, "POST", path, body.toString());
            return response.status() == OK ? reader.read(response) : refused(response.text());
        } catch (IOException error) {
            if (isCut()) {
                return new Answer(End.STOPPED, "", Timings.NONE);
            }
            throw error;
        } finally {
            synchronized (this) {
                open = null;
            }
        }
    }

    private static Answer stream(InputStream in, Engine.Sink sink) throws IOException, JSONException {
        End end = End.COMPLETE;
        Timings timings = Timings.NONE;
        while (true) {
            String line = Http.line(in);
            if (line.startsWith("error: ")) {
                return refused(line.substring("error: ".length()));
            }
            if (!line.startsWith(DATA)) {
                continue;
            }
            String data = line.substring(DATA.length());
            if (data.equals("[DONE]")) {
                return new Answer(end, "", timings);
            }
            JSONObject event = new JSONObject(data);
            if (event.has("error")) {
                return refused(data);
            }
            if (event.has("timings")) {
                timings = timings(event.getJSONObject("timings"));
            }
            JSONArray choices = event.optJSONArray("choices");
            JSONObject choice = choices == null ? null : choices.optJSONObject(0);
            if (choice == null) {
                continue;
            }
            if (choice.optString("finish_reason").equals("length")) {
                end = End.CUT;
            }
            JSONObject delta = choice.optJSONObject("delta");
            if (delta != null && !delta.isNull("content")) {
                sink.piece(delta.getString("content"));
            }
        }
    }

    private static Answer refused(String said) {
        String message = said;
        String type = "";
        try {
            JSONObject whole = new JSONObject(said);
            JSONObject error = whole.optJSONObject("error") == null ? whole : whole.getJSONObject("error");
            message = error.optString("message", said);
            type = error.optString("type");
        } catch (JSONException error) {
            // What it said is no JSON: it is shown as it is.
        }
        return new Answer(type.equals("exceed_context_size_error") ? End.TOO_LONG : End.FAILED, message, Timings.NONE);
    }

    private static Timings timings(JSONObject said) {
        if (said == null) {
            return Timings.NONE;
        }
        return new Timings(
                said.optInt("prompt_n"), said.optDouble("prompt_per_second", 0), said.optInt("predicted_n"), said.optDouble("predicted_per_second", 0));
    }

    private static void close(Transport.Connection connection) {
        if (connection != null) {
            try {
                connection.close();
            } catch (IOException error) {
                // It is gone already.
            }
        }
    }
}
