package org.cdcda.app.engine;

import java.io.File;
import java.io.IOException;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.Executor;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import org.cdcda.app.engine.Answer.End;
import org.cdcda.app.engine.Answer.Timings;
import org.cdcda.app.engine.EngineState.Failure;
import org.cdcda.app.engine.EngineState.Phase;

/**
 * llama.cpp's llama-server as a process of the app's own, on a unix socket in the app's private folder. A crash there, or a kill for its
 * memory, is a state here.
 */
public final class LlamaEngine implements Engine {
    private static final int KILLED = 128 + 9;
    private static final long POLL_MILLIS = 100;
    private static final long GONE_MILLIS = 1000;
    /** Unix sockets have short names: sun_path holds 108 bytes. */
    private static final String SOCKET = "engine.sock";

    private final List<String> program;
    private final File folder;
    private final Transport transport;
    private final Executor listeners;
    private final long patience;
    private final ExecutorService worker = Executors.newSingleThreadExecutor(task -> {
        var thread = new Thread(task, "engine");
        thread.setDaemon(true);
        return thread;
    });
    private final List<Listener> watching = new CopyOnWriteArrayList<>();

    // Guarded by this.
    private EngineState state = EngineState.ABSENT;
    private Server server;
    private Api api;
    /** Counts what was asked for: work for an older wish has no word. */
    private int wish;

    /**
     * @param program the engine's program, behind what it needs to run (an emulator, in tests); empty where none runs on this processor
     * @param folder private to the app; holds socket and log
     * @param transport to the socket
     * @param listeners where listeners, sinks and meters are told
     * @param patience milliseconds that loading may take
     */
    public LlamaEngine(List<String> program, File folder, Transport transport, Executor listeners, long patience) {
        this.program = List.copyOf(program);
        this.folder = folder;
        this.transport = transport;
        this.listeners = listeners;
        this.patience = patience;
    }

    @Override
    public synchronized EngineState state() {
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
    public synchronized void load(Start start) {
        int mine = ++wish;
        cut();
        become(EngineState.of(Phase.LOADING));
        worker.execute(() -> begin(start, mine));
    }

    @Override
    public synchronized void unload() {
        ++wish;
        cut();
        Server running = server;
        become(EngineState.ABSENT);
        worker.execute(this::endServer);
        if (running != null) {
            // The worker may wait for the model to load: it notices that its engine is gone.
            var killer = new Thread(running::end, "engine-end");
            killer.setDaemon(true);
            killer.start();
        }
    }

    @Override
    public synchronized void generate(Request request, Sink sink) {
        ask(
                (asked, mine) -> {
                    Answer answer = asked.chat(request, new Sink() {
                        @Override
                        public void piece(String text) {
                            listeners.execute(() -> sink.piece(text));
                        }

                        @Override
                        public void done(Answer ignored) {}
                    });
                    return () -> sink.done(answer);
                },
                detail -> sink.done(Answer.failed(detail)));
    }

    @Override
    public synchronized void measure(int promptTokens, int answerTokens, int repeats, long atLeastMillis, Meter meter) {
        ask(
                (asked, mine) -> {
                    var chance = new Random(0);
                    asked.measure(promptTokens, answerTokens, chance); // the first one pays for what is set up once
                    long until = System.nanoTime() + atLeastMillis * 1_000_000;
                    for (int done = 0; (done < repeats || System.nanoTime() < until) && !asked.isCut(); done++) {
                        Timings timings = asked.measure(promptTokens, answerTokens, chance);
                        listeners.execute(() -> meter.measured(timings));
                    }
                    boolean complete = !asked.isCut();
                    return () -> meter.done(complete, "");
                },
                detail -> meter.done(false, detail));
    }

    @Override
    public synchronized void stop() {
        if (state.phase() == Phase.GENERATING) {
            cut();
        }
    }

    // Loading.

    private void begin(Start start, int mine) {
        endServer();
        if (program.isEmpty()) {
            become(EngineState.failed(Failure.UNSUPPORTED_CPU, ""), mine);
            return;
        }
        var socket = new File(folder, SOCKET);
        socket.delete(); // of an engine that was killed
        Server started;
        try {
            started = Server.start("sh", command(start, socket), new File(folder, "engine.log"), status -> died(mine, status));
        } catch (IOException error) {
            become(EngineState.failed(Failure.DID_NOT_START, String.valueOf(error.getMessage())), mine);
            return;
        }
        synchronized (this) {
            server = started;
            api = new Api(transport, socket);
        }
        long until = System.nanoTime() + patience * 1_000_000;
        while (isWished(mine)) {
            if (api.isHealthy()) {
                become(EngineState.of(Phase.READY), mine);
                if (!started.isAlive()) { // whoever was told of it thought that it still loads
                    died(mine, started.status());
                }
                return;
            }
            if (started.isGoneWithin(POLL_MILLIS)) {
                int status = started.status();
                Failure why = status == KILLED || started.ranOutOfMemory() ? Failure.NOT_ENOUGH_MEMORY : Failure.DID_NOT_START;
                become(EngineState.failed(why, started.complaint()), mine);
                return;
            }
            if (System.nanoTime() > until) {
                become(EngineState.failed(Failure.TOO_SLOW, ""), mine);
                break;
            }
        }
        endServer();
    }

    private List<String> command(Start start, File socket) {
        List<String> words = new ArrayList<>(program);
        words.addAll(List.of("--model", start.model().getPath(), "--host", socket.getPath(), "--ctx-size", String.valueOf(start.context())));
        words.addAll(List.of("--threads", String.valueOf(start.threads()), "--parallel", "1", "--cache-ram", "0"));
        words.addAll(List.of("--no-ui", "--offline", "--load-mode", "none"));
        if (start.cores() != 0) {
            words.addAll(List.of("--cpu-mask", "0x" + Long.toHexString(start.cores())));
        }
        if (start.adapter() != null) {
            words.addAll(List.of("--lora", start.adapter().getPath()));
        }
        return words;
    }

    private void endServer() {
        Server running;
        synchronized (this) {
            running = server;
            server = null;
        }
        if (running != null) {
            running.end();
        }
    }

    /** The engine's process ended by itself. */
    private synchronized void died(int mine, int status) {
        // While it loads, begin() finds out and says more.
        if (mine == wish && (state.phase() == Phase.READY || state.phase() == Phase.GENERATING)) {
            String word = server == null ? "" : server.complaint();
            server = null;
            become(EngineState.failed(status == KILLED ? Failure.NOT_ENOUGH_MEMORY : Failure.DIED, word));
        }
    }

    // Asking.

    private interface Question {
        /** Asks, and returns what to tell at the end. */
        Runnable ask(Api api, int mine) throws IOException;
    }

    private interface Complaint {
        void say(String detail);
    }

    private void ask(Question question, Complaint complaint) {
        if (!state.isReady()) {
            listeners.execute(() -> complaint.say(""));
            return;
        }
        int mine = wish;
        api.mend();
        become(EngineState.of(Phase.GENERATING));
        worker.execute(() -> {
            Runnable told;
            try {
                told = question.ask(api, mine);
            } catch (IOException error) {
                // A connection that ends in the middle is most often an engine that was killed: its guard knows in a moment.
                Server asked = server();
                if (asked != null) {
                    asked.isGoneWithin(GONE_MILLIS);
                }
                told = () -> complaint.say(String.valueOf(error.getMessage()));
            }
            synchronized (this) {
                if (mine == wish && state.phase() == Phase.GENERATING && server != null && server.isAlive()) {
                    become(EngineState.of(Phase.READY));
                }
            }
            listeners.execute(told);
        });
    }

    private synchronized Server server() {
        return server;
    }

    private synchronized boolean isWished(int mine) {
        return mine == wish;
    }

    private void cut() {
        if (api != null) {
            api.cut();
        }
    }

    private synchronized void become(EngineState next, int mine) {
        if (mine == wish) {
            become(next);
        }
    }

    private void become(EngineState next) {
        state = next;
        for (Listener listener : watching) {
            listeners.execute(() -> listener.changed(next));
        }
    }
}
