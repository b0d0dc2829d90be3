package org.cdcda.app.ui;

import android.os.Bundle;
import android.view.View;
import android.widget.SeekBar;
import android.widget.TextView;
import java.util.function.IntConsumer;
import java.util.function.IntFunction;
import org.cdcda.app.R;
import org.cdcda.app.Settings;
import org.cdcda.app.device.Cpu;
import org.cdcda.app.model.Model;

/** Threads, context, temperature, length. */
public final class SettingsActivity extends Page {
    /** The smallest context too: the benchmark's question and answer go into it. */
    private static final int CONTEXT_STEP = 512;
    private static final int ANSWER_STEP = 32;
    private static final int ANSWER_STEPS = 16;
    private static final float TEMPERATURE_STEP = 0.1f;
    private static final int TEMPERATURE_STEPS = 15;
    private static final int USUAL_CONTEXT = 2048;

    private Settings settings;
    private int threads;
    private int context;

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        settings = session.settings();
        threads = settings.threads();
        context = settings.context();
        int big = Cpu.bigCores(session.device().cores()).size();
        addSlider(
                big,
                threads,
                at -> words.text(R.string.settings_threads, at == 0 ? words.text(R.string.settings_threads_auto, big) : String.valueOf(at)),
                words.text(R.string.settings_reload),
                settings::setThreads);
        Model model = session.status().model();
        int most = model == null ? USUAL_CONTEXT : model.bundle().contextLength();
        int steps = Math.max(1, most / CONTEXT_STEP);
        addSlider(
                steps - 1,
                (context == 0 ? most : Math.min(context, most)) / CONTEXT_STEP - 1,
                at -> words.text(R.string.settings_context, (at + 1) * CONTEXT_STEP),
                "",
                at -> settings.setContext((at + 1) * CONTEXT_STEP));
        addSlider(
                TEMPERATURE_STEPS,
                Math.round(settings.temperature() / TEMPERATURE_STEP),
                at -> words.text(R.string.settings_temperature, words.number(at * TEMPERATURE_STEP)),
                words.text(R.string.settings_temperature_help),
                at -> settings.setTemperature(at * TEMPERATURE_STEP));
        addSlider(
                ANSWER_STEPS - 1,
                settings.answerTokens() / ANSWER_STEP - 1,
                at -> words.text(R.string.settings_answer, (at + 1) * ANSWER_STEP),
                "",
                at -> settings.setAnswerTokens((at + 1) * ANSWER_STEP));
    }

    private void addSlider(int most, int at, IntFunction<String> told, String help, IntConsumer chosen) {
        View row = add(R.layout.slider);
        // Four rows of one layout: with one id for all, Android would give all of them the last one's position.
        SeekBar bar = row.findViewById(R.id.bar);
        bar.setId(View.generateViewId());
        bar.setSaveEnabled(false);
        TextView label = row.findViewById(R.id.label);
        label.setLabelFor(bar.getId());
        bar.setMax(most);
        bar.setProgress(Math.max(0, at));
        label.setText(told.apply(bar.getProgress()));
        bar.setContentDescription(label.getText());
        set(row, R.id.help, help);
        bar.setOnSeekBarChangeListener(new SeekBar.OnSeekBarChangeListener() {
            @Override
            public void onProgressChanged(SeekBar moved, int position, boolean byUser) {
                label.setText(told.apply(position));
                moved.setContentDescription(label.getText());
                chosen.accept(position);
            }

            @Override
            public void onStartTrackingTouch(SeekBar moved) {}

            @Override
            public void onStopTrackingTouch(SeekBar moved) {}
        });
    }

    @Override
    protected void onStop() {
        super.onStop();
        if (threads != settings.threads() || context != settings.context()) {
            threads = settings.threads();
            context = settings.context();
            session.restart();
        }
    }
}
