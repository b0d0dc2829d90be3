package org.cdcda.app.engine;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertTrue;
import static org.junit.Assume.assumeTrue;

import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;
import org.junit.After;
import org.junit.Before;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;
import org.junit.runner.RunWith;
import org.junit.runners.Parameterized;

/** No engine is left behind, whichever of the processes around it is killed; in this machine's shell and in Android's. */
@RunWith(Parameterized.class)
public class ServerTest {
    private static final String ENGINE = "tail";

    @Rule
    public final TemporaryFolder folder = new TemporaryFolder();

    private final String shell;
    private final BlockingQueue<Integer> died = new LinkedBlockingQueue<>();
    private ProcessHandle parent;
    private ProcessHandle engine;

    public ServerTest(String shell) {
        this.shell = shell;
    }

    @Parameterized.Parameters(name = "{0}")
    public static List<String> shells() {
        return List.of("sh", "mksh");
    }

    @Before
    public void isThere() {
        boolean isInstalled = Arrays.stream(System.getenv("PATH").split(":")).anyMatch(place -> new File(place, shell).canExecute());
        assumeTrue(shell + " is not installed", isInstalled || System.getenv("CI") != null);
    }

    @After
    public void end() {
        if (engine != null) {
            engine.destroyForcibly();
        }
    }

    private Server start(String... command) throws Exception {
        return Server.start(shell, List.of(command), new File(folder.getRoot(), "log"), died::add);
    }

    /** Starts an engine that does not end by itself, and finds its process. */
    private Server start() throws Exception {
        String mark = folder.newFile("mark").getPath();
        Server server = start(ENGINE, "-f", mark);
        parent = await(() -> ProcessHandle.current().children().filter(child -> line(child).contains(mark)).findAny());
        engine = await(() -> parent.children().filter(child -> line(child).matches("(\\S*/)?" + ENGINE + " .*")).findAny());
        return server;
    }

    private static String line(ProcessHandle process) {
        return process.info().commandLine().orElse("");
    }

    private static <T> T await(Supplier<Optional<T>> found) throws InterruptedException {
        for (int waited = 0; waited < 5000; waited += 20) {
            Optional<T> one = found.get();
            if (one.isPresent()) {
                return one.get();
            }
            Thread.sleep(20);
        }
        throw new AssertionError("it did not come");
    }

    private static boolean isGone(ProcessHandle process) throws Exception {
        for (int waited = 0; waited < 2000; waited += 20) {
            try {
                if (Files.readAllBytes(Path.of("/proc", String.valueOf(process.pid()), "cmdline")).length == 0) {
                    return true; // nobody has asked yet how it ended
                }
            } catch (IOException error) {
                return true;
            }
            Thread.sleep(20);
        }
        return false;
    }

    @Test
    public void theExitStatusIsTheEngines() throws Exception {
        start("sh", "-c", "exit 7");
        assertEquals(7, (int) died.poll(5, TimeUnit.SECONDS));
        start("sh", "-c", "kill -9 $$");
        assertEquals(128 + 9, (int) died.poll(5, TimeUnit.SECONDS));
    }

    @Test
    public void endEndsIt() throws Exception {
        start().end();
        assertTrue(isGone(engine));
        assertNull(died.poll(100, TimeUnit.MILLISECONDS));
    }

    @Test
    public void endEndsItWhereTheGuardWasKilled() throws Exception {
        Server server = start();
        ProcessHandle guard = await(() -> parent.children().filter(child -> !child.equals(engine)).findAny());
        guard.destroyForcibly();
        assertTrue(isGone(guard));
        server.end();
        assertTrue(isGone(engine));
        assertFalse(server.isAlive());
    }

    @Test
    public void itEndsWhereTheShellWasKilled() throws Exception {
        start();
        parent.destroyForcibly();
        assertTrue(isGone(engine));
        assertEquals(128 + 9, (int) died.poll(5, TimeUnit.SECONDS));
    }
}
