package org.cdcda.app.model;

import java.io.File;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.function.BooleanSupplier;
import java.util.function.LongConsumer;

/** Copies one file of a bundle: goes on where it was stopped, and gives the file its name only when its hash is right. */
final class Copy {
    private static final int BUFFER = 1 << 18;
    private static final String PARTIAL = ".partial";

    /** Opens the source behind so many bytes. */
    interface Source {
        InputStream open(long skipped) throws IOException;
    }

    private Copy() {}

    /**
     * Copies.
     *
     * @param source where the bytes come from
     * @param part what they must be
     * @param target where they go
     * @param arrived told of bytes as they arrive, and of fewer where they have to come again
     * @param stopped asked now and then
     */
    static void copy(Source source, Bundle.Part part, File target, LongConsumer arrived, BooleanSupplier stopped) throws IOException {
        if (target.length() == part.bytes() && hash(target, stopped).equals(part.sha256())) {
            arrived.accept(part.bytes());
            return;
        }
        target.delete();
        File partial = partial(target, part);
        long there = Math.min(partial.length(), part.bytes());
        MessageDigest digest = sha256();
        byte[] buffer = new byte[BUFFER];
        if (there > 0) {
            try (InputStream in = new FileInputStream(partial)) {
                pump(in, there, buffer, digest, stopped);
            }
            arrived.accept(there);
        }
        long left = part.bytes() - there;
        try (InputStream in = source.open(there);
                var out = new FileOutputStream(partial, there > 0)) {
            for (int count; left > 0 && (count = in.read(buffer, 0, (int) Math.min(buffer.length, left))) >= 0; left -= count) {
                stopIf(stopped);
                out.write(buffer, 0, count);
                digest.update(buffer, 0, count);
                arrived.accept(count);
            }
            out.getFD().sync();
        }
        if (!hex(digest.digest()).equals(part.sha256())) {
            partial.delete();
            if (there > 0) { // what was there may be the damaged part, of a phone that went dark: from the beginning, once
                arrived.accept(left - part.bytes());
                copy(source, part, target, arrived, stopped);
                return;
            }
            throw new StoreException(StoreException.Problem.DAMAGED, part.name(), 0);
        }
        if (!partial.renameTo(target)) {
            throw new IOException("cannot rename " + partial);
        }
    }

    /** Returns where a file grows; named by its hash, so that nothing else is ever continued. */
    static File partial(File target, Bundle.Part part) {
        return new File(target.getPath() + "." + part.sha256().substring(0, Math.min(16, part.sha256().length())) + PARTIAL);
    }

    /** Returns the SHA-256 of a file. */
    static String hash(File file, BooleanSupplier stopped) throws IOException {
        MessageDigest digest = sha256();
        try (InputStream in = new FileInputStream(file)) {
            pump(in, file.length(), new byte[BUFFER], digest, stopped);
        }
        return hex(digest.digest());
    }

    private static void pump(InputStream in, long count, byte[] buffer, MessageDigest digest, BooleanSupplier stopped)
            throws IOException {
        long left = count;
        for (int got; left > 0 && (got = in.read(buffer, 0, (int) Math.min(buffer.length, left))) >= 0; left -= got) {
            stopIf(stopped);
            digest.update(buffer, 0, got);
        }
    }

    private static void stopIf(BooleanSupplier stopped) throws StoreException {
        if (stopped.getAsBoolean()) {
            throw new StoreException(StoreException.Problem.STOPPED, "", 0);
        }
    }

    private static MessageDigest sha256() {
        try {
            return MessageDigest.getInstance("SHA-256");
        } catch (NoSuchAlgorithmException error) {
            throw new IllegalStateException(error);
        }
    }

    private static String hex(byte[] bytes) {
        var text = new StringBuilder();
        for (byte one : bytes) {
            text.append(Character.forDigit(one >> 4 & 15, 16)).append(Character.forDigit(one & 15, 16));
        }
        return text.toString();
    }
}
