package org.cdcda.app.engine;

import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.StandardProtocolFamily;
import java.net.UnixDomainSocketAddress;
import java.nio.channels.Channels;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;

/** A program that behaves as llama-server does, or misbehaves as its first argument says; it runs in a process of its own. */
public final class FakeServer {
    private static volatile int healthy;

    private FakeServer() {}

    /** Returns how to start it. */
    static List<String> command(String mood) {
        return List.of(Path.of(System.getProperty("java.home"), "bin", "java").toString(), "-cp", System.getProperty("java.class.path"), FakeServer.class.getName(), mood);
    }

    public static void main(String[] words) throws Exception {
        String mood = words[0];
        List<String> options = Arrays.asList(words);
        System.out.println("started with " + String.join(" ", options.subList(1, options.size())));
        switch (mood) {
            case "refuses" -> exit("0.00.123 E llama_model_load: error loading model: unknown model architecture\n0.00.124 E srv main: exiting due to model loading error", 1);
            case "out of memory" -> exit("0.00.2 E alloc_buffer: failed to allocate buffer of size 9\n0.00.3 E srv main: exiting due to model loading error", 1);
            default -> {}
        }
        ServerSocketChannel server = ServerSocketChannel.open(StandardProtocolFamily.UNIX);
        server.bind(UnixDomainSocketAddress.of(options.get(options.indexOf("--host") + 1)));
        while (true) {
            SocketChannel client = server.accept();
            new Thread(() -> serve(client, mood)).start();
        }
    }

    private static void exit(String word, int status) {
        System.out.println(word);
        System.exit(status);
    }

    private static void serve(SocketChannel client, String mood) {
        try (client) {
            InputStream in = Channels.newInputStream(client);
            OutputStream out = Channels.newOutputStream(client);
            String first = Http.line(in);
            int length = 0;
            for (String header; !(header = Http.line(in)).isEmpty(); ) {
                if (header.startsWith("Content-Length: ")) {
                    length = Integer.parseInt(header.substring("Content-Length: ".length()));
                }
            }
            String body = new String(in.readNBytes(length), StandardCharsets.UTF_8);
            if (first.contains("/health")) {
                boolean isReady = !mood.equals("loads forever") && ++healthy > 2;
                say(out, isReady ? "200 OK" : "503 Loading", "{}");
            } else if (first.contains("/completion HTTP")) {
                say(out, "200 OK", "{\"content\":\"x\",\"timings\":{\"prompt_n\":256,\"prompt_per_second\":400.0,\"predicted_n\":64,\"predicted_per_second\":40.0}}");
            } else if (body.contains("too long")) {
                say(out, "400 Bad", "{\"error\":{\"code\":400,\"message\":\"the request exceeds the context\",\"type\":\"exceed_context_size_error\"}}");
            } else {
                chat(out, body, mood);
            }
        } catch (IOException error) {
            // The other side closed: what a stop does.
        }
    }

    private static void say(OutputStream out, String status, String json) throws IOException {
        byte[] content = json.getBytes(StandardCharsets.UTF_8);
        out.write(("HTTP/1.1 " + status + "\r\nContent-Length: " + content.length + "\r\n\r\n").getBytes(StandardCharsets.US_ASCII));
        out.write(content);
    }

    private static void chat(OutputStream out, String body, String mood) throws IOException {
        out.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".getBytes(StandardCharsets.US_ASCII));
        String scale = body.replaceAll(".*\"scale\":([0-9.]+).*", "$1");
        String[] pieces = {"Grüß", "e, 世", "界 ", scale};
        for (int at = 0; at < pieces.length || mood.equals("talks on"); at++) {
            event(out, "{\"choices\":[{\"delta\":{\"content\":\"" + pieces[at % pieces.length] + "\"},\"finish_reason\":null}]}");
            if (mood.equals("dies") && at == 1) {
                System.out.println("GGML_ASSERT(x) failed");
                Runtime.getRuntime().halt(139);
            }
            if (mood.equals("talks on")) {
                pause();
            }
        }
        String why = body.contains("\"max_tokens\":4,") || body.contains("\"max_tokens\":4}") ? "length" : "stop";
        event(out, "{\"choices\":[{\"delta\":{},\"finish_reason\":\"" + why + "\"}],\"timings\":{\"prompt_n\":5,\"prompt_per_second\":100.0,\"predicted_n\":4,\"predicted_per_second\":20.0}}");
        chunk(out, "data: [DONE]\n\n");
        out.write("0\r\n\r\n".getBytes(StandardCharsets.US_ASCII));
    }

    private static void event(OutputStream out, String json) throws IOException {
        String text = "data: " + json + "\n\n";
        // In two chunks, of which one ends in the middle of a character.
        byte[] all = text.getBytes(StandardCharsets.UTF_8);
        int half = all.length / 2;
        raw(out, Arrays.copyOf(all, half));
        raw(out, Arrays.copyOfRange(all, half, all.length));
    }

    private static void chunk(OutputStream out, String text) throws IOException {
        raw(out, text.getBytes(StandardCharsets.UTF_8));
    }

    private static void raw(OutputStream out, byte[] content) throws IOException {
        out.write((Integer.toHexString(content.length) + "\r\n").getBytes(StandardCharsets.US_ASCII));
        out.write(content);
        out.write("\r\n".getBytes(StandardCharsets.US_ASCII));
    }

    private static void pause() {
        try {
            Thread.sleep(20);
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
        }
    }
}
