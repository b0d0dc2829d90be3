package org.cdcda.app.engine;

import java.io.BufferedInputStream;
import java.io.ByteArrayOutputStream;
import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.util.Locale;

/** As much of HTTP/1.1 as llama-server speaks over its socket: one request for each connection, chunked bodies as they come. */
final class Http {

    /** A status and a body that is read as it comes. */
    record Response(int status, InputStream body) {
        String text() throws IOException {
            var all = new ByteArrayOutputStream();
            byte[] buffer = new byte[8192];
            for (int count; (count = body.read(buffer)) >= 0; ) {
                all.write(buffer, 0, count);
            }
            return all.toString(StandardCharsets.UTF_8.name());
        }
    }

    private Http() {}

    /** Sends a request and reads the head of the answer. */
    static Response send(Transport.Connection connection, String method, String path, String json) throws IOException {
        byte[] content = json.getBytes(StandardCharsets.UTF_8);
        String head = method + " " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                + "Content-Type: application/json\r\nContent-Length: " + content.length + "\r\n\r\n";
        var request = new ByteArrayOutputStream();
        request.write(head.getBytes(StandardCharsets.US_ASCII));
        request.write(content);
        connection.out().write(request.toByteArray());
        // No flush: a socket keeps nothing back, and Android's flush would wait until the engine has read everything, however long.
        InputStream in = new BufferedInputStream(connection.in());
        String[] status = line(in).split(" ", 3);
        if (status.length < 2) {
            throw new IOException("no HTTP answer");
        }
        boolean chunked = false;
        long length = -1;
        for (String header; !(header = line(in)).isEmpty(); ) {
            String small = header.toLowerCase(Locale.ROOT);
            if (small.startsWith("transfer-encoding:")) {
                chunked = small.contains("chunked");
            } else if (small.startsWith("content-length:")) {
                length = number(small.substring("content-length:".length()).trim(), 10);
            }
        }
        return new Response((int) number(status[1], 10), chunked ? new Chunked(in) : length >= 0 ? new Limited(in, length) : in);
    }

    /** Reads a line of bytes up to CR LF. */
    static String line(InputStream in) throws IOException {
        var found = new ByteArrayOutputStream();
        for (int next; (next = in.read()) != '\n'; ) {
            if (next < 0) {
                throw new EOFException("the engine closed the connection");
            }
            found.write(next);
        }
        String text = found.toString(StandardCharsets.UTF_8.name());
        return text.endsWith("\r") ? text.substring(0, text.length() - 1) : text;
    }

    private static long number(String text, int radix) throws IOException {
        try {
            return Long.parseLong(text, radix);
        } catch (NumberFormatException error) {
            throw new IOException("no HTTP answer: " + text, error);
        }
    }

    /** What is read in pieces can be read byte by byte. */
    private abstract static class Pieces extends InputStream {
        @Override
        public int read() throws IOException {
            byte[] one = new byte[1];
            return read(one, 0, 1) < 0 ? -1 : one[0] & 0xff;
        }

        @Override
        public abstract int read(byte[] target, int offset, int count) throws IOException;
    }

    /** So many bytes of a stream; that it ends before is an error. */
    private static final class Limited extends Pieces {
        private final InputStream in;
        private long left;

        Limited(InputStream in, long left) {
            this.in = in;
            this.left = left;
        }

        @Override
        public int read(byte[] target, int offset, int count) throws IOException {
            if (left == 0) {
                return -1;
            }
            int got = in.read(target, offset, (int) Math.min(count, left));
            if (got < 0) {
                throw new EOFException("the engine closed the connection");
            }
            left -= got;
            return got;
        }
    }

    /** A body in chunks. */
    private static final class Chunked extends Pieces {
        private final InputStream in;
        private Limited chunk;
        private boolean ended;

        Chunked(InputStream in) {
            this.in = in;
        }

        @Override
        public int read(byte[] target, int offset, int count) throws IOException {
            while (!ended) {
                if (chunk != null) {
                    int got = chunk.read(target, offset, count);
                    if (got >= 0) {
                        return got;
                    }
                    line(in); // what stands behind every chunk
                }
                long size = number(line(in).split(";", 2)[0].trim(), 16);
                ended = size == 0;
                chunk = new Limited(in, size);
            }
            return -1;
        }
    }
}
