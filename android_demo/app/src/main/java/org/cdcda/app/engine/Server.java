package org.cdcda.app.engine;

import java.io.File;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.function.IntConsumer;

/**
 * The process of llama-server, which never outlives the app: a shell stands between them that holds a pipe from the app and kills the
 * engine when the pipe ends, whoever closes it. That is the kernel, where the app itself was killed.
 */
final class Server {
    private static final String GUARD = "exec 3<&0; \"$@\" 3<&- </dev/null & engine=$!; "
            + "(read gone <&3; kill -9 $engine) 2>/dev/null & guard=$!; exec 3<&-; "
            + "trap 'kill -9 $engine; wait $engine' TERM; wait $engine; status=$?; kill $guard 2>/dev/null; exit $status";
    private static final int TAIL = 4096;
    private static final long END_MILLIS = 3000;

    private final Process process;
    private final File log;
    private volatile boolean ended;

    private Server(Process process, File log) {
        this.process = process;
        this.log = log;
    }

    /**
     * Starts a program.
     *
     * @param shell stands between
     * @param command the program and its arguments
     * @param log receives everything it says
     * @param died told of the exit status, unless {@link #end} was the reason
     */
    static Server start(String shell, List<String> command, File log, IntConsumer died) throws IOException {
        List<String> guarded = new ArrayList<>(List.of(shell, "-c", GUARD, shell));
        guarded.addAll(command);
        Process process = new ProcessBuilder(guarded).redirectErrorStream(true).redirectOutput(log).start();
        var server = new Server(process, log);
        var waiting = new Thread(
                () -> {
                    int status = server.status();
                    if (!server.ended) {
                        died.accept(status);
                    }
                },
                "engine-guard");
        waiting.setDaemon(true);
        waiting.start();
        return server;
    }

    boolean isAlive() {
        return process.isAlive();
    }

    /** Waits for the end and returns the exit status; 128 and the signal's number where a signal was the reason. */
    int status() {
        while (true) {
            try {
                return process.waitFor();
            } catch (InterruptedException error) {
                // There is nothing else to do here than to wait.
            }
        }
    }

    /** Waits a little for the end and returns whether it came. */
    boolean isGoneWithin(long millis) {
        try {
            return process.waitFor(millis, TimeUnit.MILLISECONDS);
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
            return !process.isAlive();
        }
    }

    /** Kills it and waits until its memory is free. */
    void end() {
        ended = true;
        try {
            process.getOutputStream().close(); // the guard does the rest
        } catch (IOException error) {
            // Nobody reads it any more.
        }
        if (!isGoneWithin(END_MILLIS)) {
            process.destroy(); // the guard was killed: the shell itself does it. Killed with -9, it would leave the engine behind
            isGoneWithin(END_MILLIS);
        }
    }

    /** Returns what it said against going on: the first line with an error, which is the cause of the others; else its last one. */
    String complaint() {
        String[] lines = tail().split("\n");
        for (String line : lines) {
            if (line.matches("[\\d.]+ E .*")) {
                return plain(line);
            }
        }
        return plain(lines[lines.length - 1]);
    }

    /** Whether it said that there was no memory. */
    boolean ranOutOfMemory() {
        return tail().contains("failed to allocate");
    }

    /** Returns a line of the log without its time, level and place. */
    private static String plain(String line) {
        return line.replaceFirst("^[\\d.]+ [A-Z] (\\w+ +)?\\w+: +", "").trim();
    }

    private String tail() {
        try {
            byte[] all = Files.readAllBytes(log.toPath());
            int from = Math.max(0, all.length - TAIL);
            return new String(all, from, all.length - from, StandardCharsets.UTF_8).trim();
        } catch (IOException error) {
            return "";
        }
    }
}
