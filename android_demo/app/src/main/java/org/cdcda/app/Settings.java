package org.cdcda.app;

/** What the user chose, kept between starts. */
public interface Settings {
    /** Key of the chosen model, "" for the first one. */
    String model();

    void setModel(String key);

    /** Threads that compute; 0 for one on each big core. */
    int threads();

    void setThreads(int threads);

    /** Tokens of prompt and answer together; 0 for what the bundle says. */
    int context();

    void setContext(int tokens);

    /** 0 for the most likely answer. */
    float temperature();

    void setTemperature(float temperature);

    /** Tokens of an answer at most. */
    int answerTokens();

    void setAnswerTokens(int tokens);
}
