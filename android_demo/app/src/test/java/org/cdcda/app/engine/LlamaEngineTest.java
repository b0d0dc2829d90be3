package org.cdcda.app.engine;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;

import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import org.cdcda.app.engine.Answer.End;
import org.cdcda.app.engine.EngineState.Failure;
import org.cdcda.app.engine.EngineState.Phase;
import org.junit.After;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

/** The engine's process: started, asked, stopped, killed, and never left behind. */
public class LlamaEngineTest {
    private static final long PATIENCE = 20_000;
    private static final Request QUESTION = new Request("hello \"you\"", 16, 0.5, 1);
    private static final Start MODEL = new Start(new File("model.gguf"), null, 512, 2, 0b1100);

    @Rule
    public final TemporaryFolder folder = new TemporaryFolder();

    private final BlockingQueue<EngineState> states = new LinkedBlockingQueue<>();
    private LlamaEngine engine;

    private static final class Heard implements Engine.Sink {
        final List<String> pieces = new ArrayList<>();
        final BlockingQueue<Answer> end = new LinkedBlockingQueue<>();
        final BlockingQueue<String> first = new LinkedBlockingQueue<>();

        @Override
        public synchronized void piece(String text) {
            pieces.add(text);
            first.add(text);
        }

        @Override
        public void done(Answer answer) {
            end.add(answer);
        }

        Answer answer() throws InterruptedException {
            return end.poll(20, TimeUnit.SECONDS);
        }
    }

    private void start(List<String> program, long patience) {
        engine = new LlamaEngine(program, folder.getRoot(), new JvmTransport(), Runnable::run, patience);
        engine.watch(states::add);
        engine.load(MODEL);
    }

    private void start(String mood) {
        start(FakeServer.command(mood), PATIENCE);
    }

    private EngineState await(Phase phase) throws InterruptedException {
        while (true) {
            EngineState next = states.poll(20, TimeUnit.SECONDS);
            assertTrue("no " + phase, next != null);
            if (next.phase() == phase) {
                return next;
            }
        }
    }

    private Heard ask(Request request) {
        var heard = new Heard();
        engine.generate(request, heard);
        return heard;
    }

    private static boolean isRunning(String mark) throws IOException {
        try (var processes = Files.list(Path.of("/proc"))) {
            return processes.anyMatch(process -> {
                try {
                    return new String(Files.readAllBytes(process.resolve("cmdline"))).contains(mark);
                } catch (IOException error) {
                    return false;
                }
            });
        }
    }

    private boolean isGone() throws Exception {
        for (int waited = 0; waited < 2000; waited += 20) {
            if (!isRunning(new File(folder.getRoot(), "engine.sock").getPath())) {
                return true;
            }
            Thread.sleep(20);
        }
        return false;
    }

    @After
    public void end() throws Exception {
        if (engine != null) {
            engine.unload();
            assertTrue(isGone());
        }
    }

    @Test
    public void loadsAnswersAndIsReadyAgain() throws Exception {
        start("well");
        await(Phase.READY);
        Heard heard = ask(QUESTION);
        assertEquals(new Answer(End.COMPLETE, "", new Answer.Timings(5, 100, 4, 20)), heard.answer());
        assertEquals("Grüße, 世界 1", String.join("", heard.pieces));
        await(Phase.GENERATING);
        await(Phase.READY);
        assertEquals(End.CUT, ask(new Request("again", 4, 0, 0)).answer().end());
        String log = Files.readString(folder.getRoot().toPath().resolve("engine.log"));
        assertTrue(log, log.contains("--model model.gguf") && log.contains("--threads 2") && log.contains("--cpu-mask 0xc"));
    }

    @Test
    public void aQuestionThatIsTooLongIsRefusedAndTheEngineStays() throws Exception {
        start("well");
        await(Phase.READY);
        Answer answer = ask(new Request("too long", 16, 0, 1)).answer();
        assertEquals(End.TOO_LONG, answer.end());
        assertEquals("the request exceeds the context", answer.detail());
        assertEquals(Phase.READY, engine.state().phase());
    }

    @Test
    public void anAnswerCanBeStopped() throws Exception {
        start("talks on");
        await(Phase.READY);
        Heard heard = ask(QUESTION);
        heard.first.poll(20, TimeUnit.SECONDS);
        engine.stop();
        assertEquals(End.STOPPED, heard.answer().end());
        assertEquals(Phase.READY, engine.state().phase());
        Heard next = ask(QUESTION);
        next.first.poll(20, TimeUnit.SECONDS);
        engine.stop();
        assertEquals(End.STOPPED, next.answer().end());
    }

    @Test
    public void aCrashInTheMiddleIsAStateAndLoadingAgainHelps() throws Exception {
        start("dies");
        await(Phase.READY);
        Heard heard = ask(QUESTION);
        assertEquals(End.FAILED, heard.answer().end());
        EngineState state = await(Phase.FAILED);
        assertEquals(Failure.DIED, state.failure());
        assertEquals("GGML_ASSERT(x) failed", state.detail());
        assertEquals(End.FAILED, ask(QUESTION).answer().end());
        engine.load(MODEL);
        await(Phase.READY);
    }

    @Test
    public void anEngineThatIsKilledWhileItWaitsIsNoticed() throws Exception {
        start("well");
        await(Phase.READY);
        kill(FakeServer.class.getName() + '\0' + "well");
        assertEquals(Failure.NOT_ENOUGH_MEMORY, await(Phase.FAILED).failure());
    }

    private void kill(String mark) throws IOException {
        try (var processes = Files.list(Path.of("/proc"))) {
            processes.filter(process -> process.getFileName().toString().matches("\\d+")).forEach(process -> {
                try {
                    String line = new String(Files.readAllBytes(process.resolve("cmdline")));
                    if (line.contains(mark) && line.contains(folder.getRoot().getPath()) && !line.startsWith("sh\0")) {
                        ProcessHandle.of(Long.parseLong(process.getFileName().toString())).ifPresent(ProcessHandle::destroyForcibly);
                    }
                } catch (IOException error) {
                    // It is gone.
                }
            });
        }
    }

    @Test
    public void whatDoesNotStartSaysWhy() throws Exception {
        start("refuses");
        assertEquals(EngineState.failed(Failure.DID_NOT_START, "error loading model: unknown model architecture"), await(Phase.FAILED));
        start("out of memory");
        assertEquals(Failure.NOT_ENOUGH_MEMORY, await(Phase.FAILED).failure());
        start(List.of("/no/such/program"), PATIENCE);
        assertEquals(Failure.DID_NOT_START, await(Phase.FAILED).failure());
        start(List.of(), PATIENCE);
        assertEquals(Failure.UNSUPPORTED_CPU, await(Phase.FAILED).failure());
        start(FakeServer.command("loads forever"), 1500);
        assertEquals(Failure.TOO_SLOW, await(Phase.FAILED).failure());
        assertTrue(isGone());
    }

    @Test
    public void unloadingEndsALoadAndAnAnswer() throws Exception {
        start("loads forever");
        await(Phase.LOADING);
        engine.unload();
        await(Phase.ABSENT);
        assertTrue(isGone());
        start("talks on");
        await(Phase.READY);
        Heard heard = ask(QUESTION);
        heard.first.poll(20, TimeUnit.SECONDS);
        engine.unload();
        assertEquals(End.STOPPED, heard.answer().end());
        assertEquals(Phase.ABSENT, engine.state().phase());
    }

    @Test
    public void aBenchmarkMeasuresAsOftenAsAsked() throws Exception {
        start("well");
        await(Phase.READY);
        List<Answer.Timings> measured = new ArrayList<>();
        BlockingQueue<String> end = new LinkedBlockingQueue<>();
        var meter = new Engine.Meter() {
            @Override
            public void measured(Answer.Timings timings) {
                measured.add(timings);
            }

            @Override
            public void done(boolean complete, String detail) {
                end.add(complete + detail);
            }
        };
        engine.measure(256, 64, 3, 0, meter);
        assertEquals("true", end.poll(20, TimeUnit.SECONDS));
        assertEquals(3, measured.size());
        assertEquals(40, measured.get(0).decode(), 0);
        await(Phase.GENERATING);
        await(Phase.READY);
        engine.measure(256, 64, 3, 60_000, meter);
        Thread.sleep(100);
        engine.stop();
        assertEquals("false", end.poll(20, TimeUnit.SECONDS));
    }

    /** The app's own process is killed with -9: the kernel closes the pipe, and the shell kills the engine. */
    @Test
    public void anEngineDoesNotOutliveTheApp() throws Exception {
        String mark = new File(folder.getRoot(), "engine.sock").getPath();
        List<String> app = new ArrayList<>(FakeServer.command("well").subList(0, 3));
        app.addAll(List.of(Orphan.class.getName(), folder.getRoot().getPath()));
        Process process = new ProcessBuilder(app).redirectErrorStream(true).start();
        assertEquals('R', process.getInputStream().read()); // READY
        assertTrue(isRunning(mark));
        process.destroyForcibly().waitFor();
        assertTrue(isGone());
        assertFalse(isRunning(mark));
    }

    /** An app that loads and does nothing. */
    public static final class Orphan {
        private Orphan() {}

        public static void main(String[] words) throws Exception {
            var engine = new LlamaEngine(FakeServer.command("well"), new File(words[0]), new JvmTransport(), Runnable::run, PATIENCE);
            engine.watch(state -> {
                if (state.isReady()) {
                    System.out.println("READY");
                    System.out.flush();
                }
            });
            engine.load(new Start(new File("model.gguf"), null, 512, 1, 0));
            Thread.sleep(60_000);
        }
    }
}
