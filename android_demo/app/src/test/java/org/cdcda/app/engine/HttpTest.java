package org.cdcda.app.engine;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertTrue;

import java.io.ByteArrayOutputStream;
import java.io.InputStream;
import java.io.OutputStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayDeque;
import java.util.Deque;
import org.junit.Test;

/** What goes over the socket, and how often: on a phone every read is a system call. */
public class HttpTest {

    /** A connection that gives one part at each read, and nothing more. */
    private static final class Played implements Transport.Connection {
        final Deque<byte[]> parts = new ArrayDeque<>();
        final ByteArrayOutputStream sent = new ByteArrayOutputStream();
        int reads;

        Played(String... texts) {
            for (String text : texts) {
                parts.add(text.getBytes(StandardCharsets.UTF_8));
            }
        }

        @Override
        public void setPatience(int millis) {}

        @Override
        public InputStream in() {
            return new InputStream() {
                @Override
                public int read() {
                    throw new AssertionError("it reads byte by byte");
                }

                @Override
                public int read(byte[] target, int offset, int count) {
                    byte[] part = parts.poll();
                    if (part == null) {
                        throw new AssertionError("it waits for more than it needs");
                    }
                    reads++;
                    System.arraycopy(part, 0, target, offset, part.length);
                    return part.length;
                }
            };
        }

        @Override
        public OutputStream out() {
            return new OutputStream() {
                @Override
                public void write(int one) {
                    throw new AssertionError("it writes byte by byte");
                }

                @Override
                public void write(byte[] content, int offset, int count) {
                    sent.write(content, offset, count);
                }

                @Override
                public void flush() {
                    throw new AssertionError("on Android it would wait for the engine without an end");
                }
            };
        }

        @Override
        public void close() {}
    }

    @Test
    public void whatIsThereIsReadAtOnceAndWhatComesLaterIsNotWaitedFor() throws Exception {
        var played = new Played(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Long: " + "x".repeat(300) + "\r\n\r\n", "9\r\ndata: 1\n\n\r\n", "9\r\ndata: 2\n\n\r\n0\r\n\r\n");
        Http.Response response = Http.send(played, "POST", "/x", "{\"a\": 1}");
        assertEquals(1, played.reads);
        assertEquals("data: 1", Http.line(response.body()));
        assertEquals(2, played.reads);
        assertEquals("\ndata: 2\n\n", response.text());
        assertEquals(3, played.reads);
        String sent = played.sent.toString(StandardCharsets.UTF_8);
        assertTrue(sent, sent.startsWith("POST /x HTTP/1.1\r\n") && sent.endsWith("Content-Length: 8\r\n\r\n{\"a\": 1}"));
    }

    @Test
    public void aBodyOfKnownLengthEndsWithoutAnotherRead() throws Exception {
        var played = new Played("HTTP/1.1 503 Loading\r\nContent-Length: 4\r\n\r\nno", "pe");
        Http.Response response = Http.send(played, "GET", "/health", "");
        assertEquals(503, response.status());
        assertEquals("nope", response.text());
    }
}
