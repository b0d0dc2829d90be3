package org.cdcda.app;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;

/** What the tests of both languages read. */
public final class Shared {
    private Shared() {}

    /** Returns a file of tests/data. */
    public static String read(String name) throws IOException {
        return Files.readString(Path.of("..", "..", "tests", "data", name));
    }
}
