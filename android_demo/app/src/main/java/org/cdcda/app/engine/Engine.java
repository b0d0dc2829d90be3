package org.cdcda.app.engine;

/**
 * What answers. One question at a time; every method returns at once, and what happens is told to the listeners on the thread that the
 * implementation was given for them.
 */
public interface Engine {

    /** Is told of every change. */
    interface Listener {
        void changed(EngineState state);
    }

    /** Receives an answer. */
    interface Sink {
        /** The next piece of text. */
        void piece(String text);

        /** The end; nothing comes after it. */
        void done(Answer answer);
    }

    /** Receives what a benchmark measured. */
    interface Meter {
        /** One more measurement. */
        void measured(Answer.Timings timings);

        /**
         * The end.
         *
         * @param complete whether it was measured as often and as long as asked
         * @param detail what failed, "" where it was ended
         */
        void done(boolean complete, String detail);
    }

    EngineState state();

    void watch(Listener listener);

    void unwatch(Listener listener);

    /** Loads a model, after a failure too; what was loaded is unloaded first. */
    void load(Start start);

    /** Answers. */
    void generate(Request request, Sink sink);

    /** Reads random tokens and writes some, again and again, until the time is over and it was done often enough. */
    void measure(int promptTokens, int answerTokens, int repeats, long atLeastMillis, Meter meter);

    /** Ends the answer, or the benchmark. */
    void stop();

    /** Ends the engine and frees its memory. */
    void unload();
}
