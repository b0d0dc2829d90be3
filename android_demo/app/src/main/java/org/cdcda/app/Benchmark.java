package org.cdcda.app;

import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import org.cdcda.app.engine.Answer.Timings;
import org.cdcda.app.engine.Engine;
import org.cdcda.app.model.Bundle;
import org.cdcda.app.model.Model;
import org.json.JSONArray;
import org.json.JSONException;
import org.json.JSONObject;

/**
 * PocketPal's protocol (256 tokens read, 64 written behind them) on this phone, a few times or for minutes; what {@code cdcda bench --protocol
 * pocketpal} measures. Used on the main thread alone.
 */
public final class Benchmark {
    public static final int PROMPT = 256;
    static final int ANSWER = 64;
    public static final int REPEATS = 3;

    /** Is told of every measurement. */
    public interface Listener {
        void changed();
    }

    private final Session session;
    private final List<Timings> measured = new ArrayList<>();
    private final List<Listener> watching = new CopyOnWriteArrayList<>();
    private boolean isRunning;
    private boolean isComplete;
    private String failure = "";
    private Model model;
    private int threads;

    public Benchmark(Session session) {
        this.session = session;
    }

    public void watch(Listener listener) {
        watching.add(listener);
    }

    public void unwatch(Listener listener) {
        watching.remove(listener);
    }

    public boolean isRunning() {
        return isRunning;
    }

    /** Returns what ended it, "" for nothing. */
    public String failure() {
        return failure;
    }

    /** Whether it was ended before it was over, by the user or because the app went out of sight. */
    public boolean isCut() {
        return model != null && !isRunning && !isComplete && failure.isEmpty();
    }

    public List<Timings> measured() {
        return Collections.unmodifiableList(measured);
    }

    /** Measures a few times, and for so many minutes. */
    public void run(int minutes) {
        measured.clear();
        failure = "";
        isComplete = false;
        isRunning = true;
        model = session.status().model();
        threads = session.cores().size();
        session.engine().measure(PROMPT, ANSWER, REPEATS, minutes * 60_000L, new Engine.Meter() {
            @Override
            public void measured(Timings timings) {
                measured.add(timings);
                tell();
            }

            @Override
            public void done(boolean complete, String detail) {
                isRunning = false;
                isComplete = complete;
                failure = detail;
                tell();
            }
        });
        tell();
    }

    public void stop() {
        if (isRunning) {
            session.engine().stop();
        }
    }

    /** Returns the median of a speed, tokens a second. */
    public double median(boolean ofPrefill) {
        List<Double> speeds = new ArrayList<>();
        for (Timings one : measured) {
            speeds.add(ofPrefill ? one.prefill() : one.decode());
        }
        Collections.sort(speeds);
        return speeds.isEmpty() ? 0 : speeds.get(speeds.size() / 2);
    }

    /** Returns decode at the end as a share of decode at the beginning: 1 where the phone does not get slower. */
    public double endurance() {
        int tail = Math.max(1, measured.size() / 4);
        double first = 0;
        double last = 0;
        for (int at = 0; at < tail; at++) {
            first += measured.get(at).decode();
            last += measured.get(measured.size() - 1 - at).decode();
        }
        return last / first;
    }

    /** Returns everything that was measured, without a text and without what tells this phone from another of its model. */
    public String json() {
        try {
            var prefill = new JSONArray();
            var decode = new JSONArray();
            for (Timings one : measured) {
                prefill.put(one.prefill());
                decode.put(one.decode());
            }
            JSONObject result = new JSONObject()
                    .put("phone", session.device().name())
                    .put("abi", session.device().abi())
                    .put("protocol", "pocketpal")
                    .put("prompt_tokens", PROMPT)
                    .put("answer_tokens", ANSWER)
                    .put("threads", threads)
                    .put("complete", isComplete)
                    .put("prefill_tokens_per_second", prefill)
                    .put("decode_tokens_per_second", decode);
            if (model != null) {
                result.put("format", model.bundle().format()).put("quant", model.bundle().quant()).put("base", model.bundle().baseName());
                result.put("sha256", model.bundle().files().get(Bundle.MODEL).sha256());
                Bundle.Part adapter = model.bundle().files().get(Bundle.ADAPTER);
                if (adapter != null) {
                    result.put("adapter_sha256", adapter.sha256());
                }
            }
            return result.toString(2);
        } catch (JSONException error) {
            throw new IllegalStateException(error);
        }
    }

    private void tell() {
        for (Listener listener : watching) {
            listener.changed();
        }
    }
}
