package org.cdcda.app.ui;

import android.content.Context;
import android.content.SharedPreferences;
import org.cdcda.app.Settings;

/** The settings as Android keeps them. */
final class Preferences implements Settings {
    private static final float WARMTH = 0.7f;
    private static final int ANSWER = 128;

    private final SharedPreferences kept;

    Preferences(Context context) {
        kept = context.getSharedPreferences("settings", Context.MODE_PRIVATE);
    }

    @Override
    public String model() {
        return kept.getString("model", "");
    }

    @Override
    public void setModel(String name) {
        kept.edit().putString("model", name).apply();
    }

    @Override
    public int threads() {
        return kept.getInt("threads", 0);
    }

    @Override
    public void setThreads(int threads) {
        kept.edit().putInt("threads", threads).apply();
    }

    @Override
    public int context() {
        return kept.getInt("context", 0);
    }

    @Override
    public void setContext(int tokens) {
        kept.edit().putInt("context", tokens).apply();
    }

    @Override
    public float temperature() {
        return kept.getFloat("temperature", WARMTH);
    }

    @Override
    public void setTemperature(float temperature) {
        kept.edit().putFloat("temperature", temperature).apply();
    }

    @Override
    public int answerTokens() {
        return kept.getInt("answer_tokens", ANSWER);
    }

    @Override
    public void setAnswerTokens(int tokens) {
        kept.edit().putInt("answer_tokens", tokens).apply();
    }
}
