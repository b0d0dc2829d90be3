package org.cdcda.app;

import java.io.BufferedReader;
import java.io.File;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import org.cdcda.app.engine.Answer;
import org.cdcda.app.engine.Engine;
import org.cdcda.app.engine.JvmTransport;
import org.cdcda.app.engine.LlamaEngine;
import org.cdcda.app.engine.Request;
import org.cdcda.app.model.Bundle;
import org.cdcda.app.model.Model;
import org.cdcda.app.model.ModelStore;
import org.json.JSONException;
import org.json.JSONObject;

/**
 * The app without its screens, for tests from outside: {@code java Talk FOLDER CONTEXT PROGRAM...} loads the model in FOLDER (as the app's store
 * finds it) with an engine, reads commands as JSON lines and writes what happens as JSON lines.
 */
public final class Talk {
    private Talk() {}

    private static synchronized void say(Object... pairs) {
        try {
            var line = new JSONObject();
            for (int at = 0; at < pairs.length; at += 2) {
                line.put((String) pairs[at], pairs[at + 1]);
            }
            System.out.println(line);
        } catch (JSONException error) {
            throw new IllegalStateException(error);
        }
    }

    public static void main(String[] words) throws Exception {
        File folder = new File(words[0]);
        int context = Integer.parseInt(words[1]);
        List<String> program = Arrays.asList(words).subList(2, words.length);
        Model model = new ModelStore(folder, null).list().models().get(0);
        say("model", model.bundle().quant(), "sha256", model.bundle().files().get(Bundle.MODEL).sha256());
        var engine = new LlamaEngine(program, folder, new JvmTransport(), Runnable::run, 300_000);
        engine.watch(state -> say("state", state.phase().name(), "failure", state.failure().name(), "detail", state.detail()));
        var start = model.start(context, 2, 0);
        engine.load(start);
        var in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line; (line = in.readLine()) != null; ) {
            JSONObject command = new JSONObject(line);
            switch (command.getString("do")) {
                case "ask" -> ask(engine, command);
                case "begin" -> begin(engine, command);
                case "stop" -> engine.stop();
                case "load" -> engine.load(start);
                default -> engine.unload();
            }
        }
        engine.unload();
        Thread.sleep(500);
    }

    private static void ask(Engine engine, JSONObject command) throws Exception {
        begin(engine, command).await();
    }

    private static CountDownLatch begin(Engine engine, JSONObject command) throws JSONException {
        var over = new CountDownLatch(1);
        var request = new Request(command.getString("text"), command.getInt("tokens"), 0, command.optDouble("personal", 1));
        engine.generate(request, new Engine.Sink() {
            @Override
            public void piece(String text) {
                say("piece", text);
            }

            @Override
            public void done(Answer answer) {
                say("end", answer.end().name(), "detail", answer.detail(), "tokens", answer.timings().answerTokens());
                over.countDown();
            }
        });
        return over;
    }
}
