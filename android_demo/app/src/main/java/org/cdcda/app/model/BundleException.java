package org.cdcda.app.model;

/** A bundle that the app cannot use. */
public final class BundleException extends Exception {
    private static final long serialVersionUID = 1;

    /** What is wrong with it. */
    public enum Problem {
        /** It is no bundle.json, or a damaged one. */
        UNREADABLE,
        /** It was written by another version of the exporter. */
        OTHER_VERSION,
        /** Its files are not all there: a copy or a push was not finished. */
        INCOMPLETE,
        /** The app runs GGUF only. */
        NOT_GGUF,
        /** The artifact was not verified in full. */
        NOT_VERIFIED
    }

    private final Problem problem;

    BundleException(Problem problem, String detail) {
        super(detail);
        this.problem = problem;
    }

    public Problem problem() {
        return problem;
    }
}
