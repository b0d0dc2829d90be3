package org.cdcda.app;

import java.io.ByteArrayInputStream;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import org.cdcda.app.device.Cpu;
import org.cdcda.app.device.Device;
import org.cdcda.app.engine.Answer;
import org.cdcda.app.engine.Engine;
import org.cdcda.app.engine.EngineState;
import org.cdcda.app.engine.Request;
import org.cdcda.app.engine.Start;
import org.cdcda.app.model.ModelStore;
import org.json.JSONObject;

/** What stands for the phone, the engine and the package in tests. */
public final class Fakes {
    private Fakes() {}

    /** An engine that does what the test tells it. */
    public static final class FakeEngine implements Engine {
        public final List<Start> loaded = new ArrayList<>();
        public final List<Request> asked = new ArrayList<>();
        public Sink sink;
        public Meter meter;
        public boolean stopped;
        private final List<Listener> watching = new ArrayList<>();
        private EngineState state = EngineState.ABSENT;

        public void become(EngineState next) {
            state = next;
            for (Listener listener : List.copyOf(watching)) {
                listener.changed(next);
            }
        }

        public void become(EngineState.Phase phase) {
            become(EngineState.of(phase));
        }

        @Override
        public EngineState state() {
            return state;
        }

        @Override
        public void watch(Listener listener) {
            watching.add(listener);
        }

        @Override
        public void unwatch(Listener listener) {
            watching.remove(listener);
        }

        @Override
        public void load(Start start) {
            loaded.add(start);
            become(EngineState.Phase.LOADING);
        }

        @Override
        public void generate(Request request, Sink to) {
            asked.add(request);
            sink = to;
            become(EngineState.Phase.GENERATING);
        }

        /** Writes an answer and ends it. */
        public void answer(String text, Answer answer) {
            Sink to = sink;
            to.piece(text);
            become(EngineState.Phase.READY);
            to.done(answer);
        }

        @Override
        public void measure(int promptTokens, int answerTokens, int repeats, long atLeastMillis, Meter to) {
            meter = to;
            become(EngineState.Phase.GENERATING);
        }

        @Override
        public void stop() {
            stopped = true;
        }

        @Override
        public void unload() {
            become(EngineState.ABSENT);
        }
    }

    /** A phone with eight cores, of which two are big. */
    public static final class FakeDevice implements Device {
        public long memory = 8_000_000_000L;

        @Override
        public String abi() {
            return "arm64-v8a";
        }

        @Override
        public String cpuinfo() {
            return "Features: fp asimd";
        }

        @Override
        public List<Cpu.Core> cores() {
            List<Cpu.Core> cores = new ArrayList<>();
            for (int number = 0; number < 8; number++) {
                cores.add(new Cpu.Core(number, number < 6 ? 1_800_000 : 3_000_000, number < 6 ? "0xd05" : "0xd4e"));
            }
            return cores;
        }

        @Override
        public long memory() {
            return memory;
        }

        @Override
        public String name() {
            return "Maker Phone";
        }
    }

    /** Settings in memory. */
    public static final class FakeSettings implements Settings {
        private String model = "";
        private int threads;
        private int context;
        private float temperature = 0.7f;
        private int tokens = 128;

        @Override
        public String model() {
            return model;
        }

        @Override
        public void setModel(String name) {
            model = name;
        }

        @Override
        public int threads() {
            return threads;
        }

        @Override
        public void setThreads(int count) {
            threads = count;
        }

        @Override
        public int context() {
            return context;
        }

        @Override
        public void setContext(int count) {
            context = count;
        }

        @Override
        public float temperature() {
            return temperature;
        }

        @Override
        public void setTemperature(float value) {
            temperature = value;
        }

        @Override
        public int answerTokens() {
            return tokens;
        }

        @Override
        public void setAnswerTokens(int count) {
            tokens = count;
        }
    }

    /** The package's model, or picked files: tests/data/bundle.json with files that fit it. */
    public static final class FakePackage implements ModelStore.Source {
        public final Map<String, byte[]> files = new HashMap<>();

        public FakePackage(boolean canCompare) {
            try {
                JSONObject json = new JSONObject(Shared.read("bundle.json"));
                JSONObject listed = json.getJSONObject("files");
                if (!canCompare) {
                    listed.remove("adapter");
                    json.put("format", "gguf");
                }
                for (String role : canCompare ? new String[] {"model", "adapter"} : new String[] {"model"}) {
                    byte[] content = ("the weights of " + role).getBytes(StandardCharsets.UTF_8);
                    String hash = HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(content));
                    listed.getJSONObject(role).put("bytes", content.length).put("sha256", hash);
                    files.put(listed.getJSONObject(role).getString("file"), content);
                }
                files.put("LICENCES.txt", "Base model: SmolLM2. Licence: Apache-2.0.".getBytes(StandardCharsets.UTF_8));
                files.put("bundle.json", json.toString().getBytes(StandardCharsets.UTF_8));
            } catch (Exception error) {
                throw new IllegalStateException(error);
            }
        }

        /** Changes bundle.json. */
        public FakePackage with(String key, Object value) {
            try {
                String json = new String(files.get("bundle.json"), StandardCharsets.UTF_8);
                files.put("bundle.json", new JSONObject(json).put(key, value).toString().getBytes(StandardCharsets.UTF_8));
                return this;
            } catch (Exception error) {
                throw new IllegalStateException(error);
            }
        }

        @Override
        public InputStream open(String name, long skipped) throws IOException {
            if (!files.containsKey(name)) {
                throw new FileNotFoundException(name);
            }
            var in = new ByteArrayInputStream(files.get(name));
            in.skip(skipped);
            return in;
        }
    }
}
