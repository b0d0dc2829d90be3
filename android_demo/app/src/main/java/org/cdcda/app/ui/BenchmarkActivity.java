package org.cdcda.app.ui;

import android.content.Intent;
import android.os.Bundle;
import android.view.Gravity;
import android.view.View;
import android.view.ViewGroup;
import android.widget.ArrayAdapter;
import android.widget.Button;
import android.widget.LinearLayout;
import android.widget.Spinner;
import android.widget.TextView;
import java.io.IOException;
import java.io.OutputStream;
import java.nio.charset.StandardCharsets;
import java.util.List;
import org.cdcda.app.Benchmark;
import org.cdcda.app.R;
import org.cdcda.app.Status;

/** How fast this model is on this phone. */
public final class BenchmarkActivity extends Page implements Benchmark.Listener {
    private static final int SAVE = 1;
    private static final int[] MINUTES = {0, 2, 5};

    private Benchmark benchmark;
    private Spinner length;
    private Button start;
    private ViewGroup results;
    /** Why the report could not be saved, "" where it could: that is known before this screen is seen again. */
    private String unsaved = "";

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        benchmark = ((App) getApplication()).benchmark();
        addNote(words.text(R.string.benchmark_help));
        var notice = new TextView(this, null, 0, R.style.Body);
        notice.setId(R.id.notice_text);
        content.addView(notice);
        var label = new TextView(this, null, 0, R.style.Label);
        label.setText(R.string.benchmark_length);
        label.setLabelFor(R.id.task);
        content.addView(label);
        length = new Spinner(this);
        length.setId(R.id.task);
        length.setMinimumHeight(getResources().getDimensionPixelSize(R.dimen.touch));
        List<String> lengths = List.of(
                words.text(R.string.benchmark_short),
                words.text(R.string.benchmark_minutes, MINUTES[1]),
                words.text(R.string.benchmark_minutes, MINUTES[2]));
        var adapter = new ArrayAdapter<>(this, android.R.layout.simple_spinner_item, lengths);
        adapter.setDropDownViewResource(android.R.layout.simple_spinner_dropdown_item);
        length.setAdapter(adapter);
        content.addView(length);
        start = addMainButton(view -> {
            if (benchmark.isRunning()) {
                benchmark.stop();
            } else {
                benchmark.run(MINUTES[length.getSelectedItemPosition()]);
            }
        });
        results = new LinearLayout(this);
        ((LinearLayout) results).setOrientation(LinearLayout.VERTICAL);
        content.addView(results);
    }

    @Override
    protected void onStart() {
        super.onStart();
        benchmark.watch(this);
        changed();
        // A screen that goes dark slows the phone down.
        content.setKeepScreenOn(true);
    }

    @Override
    protected void onStop() {
        benchmark.unwatch(this);
        if (!isChangingConfigurations()) {
            benchmark.stop(); // out of sight Android gives slow cores, and nobody would know why the model is busy
        }
        super.onStop();
    }

    @Override
    public void changed(Status status) {
        boolean isBusy = status.isGenerating() && !benchmark.isRunning();
        set(content, R.id.notice_text, isBusy ? words.text(R.string.engine_busy) : words.of(status, session));
        start.setEnabled(benchmark.isRunning() || status.isReady());
        start.setAlpha(start.isEnabled() ? 1 : 0.5f);
    }

    @Override
    public void changed() {
        start.setText(benchmark.isRunning() ? R.string.stop : R.string.benchmark_start);
        changed(session.status());
        results.removeAllViews();
        int count = benchmark.measured().size();
        if (!benchmark.failure().isEmpty()) {
            addResult(R.string.benchmark, words.text(R.string.end_failed, benchmark.failure()));
        }
        if (benchmark.isCut()) {
            addResult(R.string.benchmark, words.text(R.string.benchmark_cut));
        }
        if (count == 0) {
            return;
        }
        double prefill = benchmark.median(true);
        double decode = benchmark.median(false);
        addResult(R.string.benchmark_prefill, words.text(R.string.tokens_a_second, words.number(prefill)));
        addResult(R.string.benchmark_decode, words.text(R.string.tokens_a_second, words.number(decode)));
        addResult(R.string.benchmark_first, words.text(R.string.seconds, words.number(Benchmark.PROMPT / prefill + 1 / decode)));
        if (count > Benchmark.REPEATS) {
            addResult(R.string.benchmark_endurance, words.text(R.string.benchmark_endurance_value, words.percent(benchmark.endurance())));
        }
        addResult(R.string.benchmark, words.text(R.string.benchmark_count, count));
        if (!benchmark.isRunning()) {
            var save = new Button(this, null, 0, R.style.Quiet);
            save.setText(R.string.export_json);
            save.setGravity(Gravity.CENTER);
            save.setOnClickListener(view -> startForResult(
                    new Intent(Intent.ACTION_CREATE_DOCUMENT)
                            .addCategory(Intent.CATEGORY_OPENABLE)
                            .setType("application/json")
                            .putExtra(Intent.EXTRA_TITLE, "benchmark.json"),
                    SAVE));
            results.addView(save);
        }
        if (!unsaved.isEmpty()) {
            addResult(R.string.export_json, unsaved);
        }
    }

    private void addResult(int label, String value) {
        View row = getLayoutInflater().inflate(R.layout.fact, results, false);
        set(row, R.id.label, words.text(label));
        set(row, R.id.value, value);
        results.addView(row);
    }

    @Override
    protected void onActivityResult(int request, int result, Intent chosen) {
        super.onActivityResult(request, result, chosen);
        boolean isChosen = request == SAVE && result == RESULT_OK && chosen != null && chosen.getData() != null;
        if (!isChosen || benchmark.measured().isEmpty()) { // the process may have ended behind the other app's screen
            return;
        }
        // Without the t an older, longer file keeps its end.
        try (OutputStream out = getContentResolver().openOutputStream(chosen.getData(), "wt")) {
            if (out == null) {
                throw new IOException(String.valueOf(chosen.getData()));
            }
            out.write(benchmark.json().getBytes(StandardCharsets.UTF_8));
            unsaved = "";
        } catch (IOException | RuntimeException error) { // whatever another app's provider throws
            unsaved = String.valueOf(error.getMessage());
        }
        changed();
    }
}
