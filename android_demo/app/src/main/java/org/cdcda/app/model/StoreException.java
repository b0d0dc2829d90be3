package org.cdcda.app.model;

import java.io.IOException;

/** A model that could not be put into the app's storage. */
public final class StoreException extends IOException {
    private static final long serialVersionUID = 1;

    /** What went wrong. */
    public enum Problem {
        NO_SPACE,
        /** What arrived is not what bundle.json names. */
        DAMAGED,
        /** A file that bundle.json names was not among those that were picked. */
        FILE_MISSING,
        STOPPED
    }

    private final Problem problem;
    private final long bytes;

    StoreException(Problem problem, String detail, long bytes) {
        super(detail);
        this.problem = problem;
        this.bytes = bytes;
    }

    public Problem problem() {
        return problem;
    }

    /** Bytes that have to be freed, for NO_SPACE. */
    public long bytes() {
        return bytes;
    }
}
