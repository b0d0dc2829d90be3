package org.cdcda.app.engine;

/**
 * How an answer ended; its text came before, piece by piece.
 *
 * @param end why it ended
 * @param detail what the engine said where it refused or failed, or ""
 * @param timings what it took
 */
public record Answer(End end, String detail, Timings timings) {

    /** Why an answer ended. */
    public enum End {
        COMPLETE,
        /** As long as was allowed. */
        CUT,
        /** The user stopped it. */
        STOPPED,
        /** Question and answer do not go into the context. */
        TOO_LONG,
        FAILED
    }

    /**
     * What an answer took.
     *
     * @param promptTokens that were read
     * @param prefill tokens read in a second, 0 where nothing was
     * @param answerTokens that were written
     * @param decode tokens written in a second, 0 where nothing was
     */
    public record Timings(int promptTokens, double prefill, int answerTokens, double decode) {
        public static final Timings NONE = new Timings(0, 0, 0, 0);
    }

    /** Returns an answer that failed. */
    public static Answer failed(String detail) {
        return new Answer(End.FAILED, detail, Timings.NONE);
    }
}
