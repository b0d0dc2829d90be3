package org.cdcda.app.engine;

/**
 * Where the engine is.
 *
 * @param phase what it does
 * @param failure why it failed; NONE in every other phase
 * @param detail the engine's own last word about a failure, or ""
 */
public record EngineState(Phase phase, Failure failure, String detail) {

    /** What the engine does. */
    public enum Phase {
        ABSENT,
        LOADING,
        READY,
        GENERATING,
        FAILED
    }

    /** Why there is no answer. */
    public enum Failure {
        NONE,
        /** The phone's processor has another instruction set. */
        UNSUPPORTED_CPU,
        /** The model does not go into the memory that an app may take, or the engine was killed, most likely for its memory. */
        NOT_ENOUGH_MEMORY,
        /** The engine ended before it could be asked. */
        DID_NOT_START,
        /** The engine did not get ready in time. */
        TOO_SLOW,
        /** The engine was there, and is gone. */
        DIED
    }

    /** No engine. */
    public static final EngineState ABSENT = of(Phase.ABSENT);

    /** Returns a phase without a failure. */
    public static EngineState of(Phase phase) {
        return new EngineState(phase, Failure.NONE, "");
    }

    /** Returns a failure. */
    public static EngineState failed(Failure failure, String detail) {
        return new EngineState(Phase.FAILED, failure, detail);
    }

    /** Whether it can be asked. */
    public boolean isReady() {
        return phase == Phase.READY;
    }
}
