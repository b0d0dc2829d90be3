package org.cdcda.app.ui;

import android.app.Activity;
import android.content.ClipData;
import android.content.ClipboardManager;
import android.content.Intent;
import android.content.res.Configuration;
import android.os.Build;
import android.os.Bundle;
import android.view.Menu;
import android.view.MenuItem;
import android.view.View;
import android.view.inputmethod.InputMethodManager;
import android.widget.ArrayAdapter;
import android.widget.Button;
import android.widget.CompoundButton;
import android.widget.EditText;
import android.widget.LinearLayout;
import android.widget.ProgressBar;
import android.widget.ScrollView;
import android.widget.Spinner;
import android.widget.Toast;
import java.util.ArrayList;
import java.util.EnumMap;
import java.util.List;
import java.util.Map;
import org.cdcda.app.R;
import org.cdcda.app.Session;
import org.cdcda.app.Status;
import org.cdcda.app.Writing;
import org.cdcda.app.Writing.Side;
import org.cdcda.app.engine.Answer;
import org.cdcda.app.model.Bundle.Preset;
import org.cdcda.app.model.Model;

/** The writing screen: a task, a text, and the answer as it comes; where the bundle allows it, the base model's answer beside it. */
public final class WritingActivity extends Activity implements Session.Listener, Writing.Listener {
    private static final String TASK = "task";
    /** Narrower, or with larger letters, two columns would be too narrow to read. */
    private static final int TWO_COLUMNS_DP = 560;
    private static final float LARGE_LETTERS = 1.3f;
    private static final int WHOLE = 1000;

    private Session session;
    private Writing writing;
    private Words words;
    private Spinner tasks;
    private EditText input;
    private CompoundButton compare;
    private Button write;
    private final Map<Side, View> panels = new EnumMap<>(Side.class);
    private List<Preset> presets = List.of();
    private Model shown;
    private int wanted;

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        App app = (App) getApplication();
        session = app.session();
        writing = app.writing();
        words = new Words(this);
        setContentView(R.layout.writing);
        tasks = findViewById(R.id.task);
        input = findViewById(R.id.input);
        compare = findViewById(R.id.compare);
        write = findViewById(R.id.write);
        LinearLayout answers = findViewById(R.id.answers);
        boolean isWide = isWide(getResources().getConfiguration());
        answers.setOrientation(isWide ? LinearLayout.HORIZONTAL : LinearLayout.VERTICAL);
        for (Side side : Side.values()) {
            panels.put(side, panel(answers, side, isWide));
        }
        write.setOnClickListener(view -> {
            if (writing.isRunning()) {
                writing.stop();
            } else {
                ask();
            }
        });
        findViewById(R.id.notice_action).setOnClickListener(view -> help());
        wanted = state == null ? 0 : state.getInt(TASK);
        offerTasks();
    }

    private static boolean isWide(Configuration now) {
        return now.screenWidthDp >= TWO_COLUMNS_DP && now.fontScale < LARGE_LETTERS;
    }

    private View panel(LinearLayout answers, Side side, boolean isWide) {
        View panel = getLayoutInflater().inflate(R.layout.answer, answers, false);
        var place = (LinearLayout.LayoutParams) panel.getLayoutParams();
        if (isWide) {
            place.width = 0;
            place.weight = 1;
            place.setMarginEnd(side == Side.PERSONAL ? getResources().getDimensionPixelSize(R.dimen.gap) : 0);
        }
        panel.findViewById(R.id.copy).setOnClickListener(view -> copy(writing.text(side)));
        panel.findViewById(R.id.share).setOnClickListener(view -> share(writing.text(side)));
        answers.addView(panel, place);
        return panel;
    }

    @Override
    protected void onStart() {
        super.onStart();
        writing.watch(this);
        session.watch(this);
        changed();
    }

    @Override
    protected void onStop() {
        session.unwatch(this);
        writing.unwatch(this);
        super.onStop();
    }

    @Override
    protected void onSaveInstanceState(Bundle state) {
        super.onSaveInstanceState(state);
        state.putInt(TASK, presets.isEmpty() ? wanted : tasks.getSelectedItemPosition());
    }

    @Override
    public boolean onCreateOptionsMenu(Menu menu) {
        getMenuInflater().inflate(R.menu.main, menu);
        return true;
    }

    @Override
    public boolean onOptionsItemSelected(MenuItem item) {
        int id = item.getItemId();
        Class<?> screen = id == R.id.models
                ? ModelsActivity.class
                : id == R.id.about ? AboutActivity.class : id == R.id.benchmark ? BenchmarkActivity.class : id == R.id.settings ? SettingsActivity.class : null;
        if (screen == null) {
            return super.onOptionsItemSelected(item);
        }
        startActivity(new Intent(this, screen));
        return true;
    }

    // What is shown.

    @Override
    public void changed(Status status) {
        if (status.model() != null && !status.model().equals(shown)) {
            shown = status.model();
            presets = shown.bundle().presets();
            offerTasks();
        }
        compare.setVisibility(shown != null && shown.bundle().canCompare() ? View.VISIBLE : View.GONE);
        boolean isBusyElsewhere = status.isGenerating() && !writing.isRunning();
        String said = isBusyElsewhere ? words.text(R.string.engine_busy) : words.of(status, session);
        // A screen reader would read every per cent.
        findViewById(R.id.notice_text)
                .setAccessibilityLiveRegion(
                        status.stage() == Status.Stage.COPYING ? View.ACCESSIBILITY_LIVE_REGION_NONE : View.ACCESSIBILITY_LIVE_REGION_POLITE);
        findViewById(R.id.notice).setVisibility(said.isEmpty() ? View.GONE : View.VISIBLE);
        Page.set(getWindow().getDecorView(), R.id.notice_text, said);
        ProgressBar progress = findViewById(R.id.notice_progress);
        progress.setVisibility(status.isBusy() ? View.VISIBLE : View.GONE);
        progress.setIndeterminate(status.stage() != Status.Stage.COPYING);
        progress.setMax(WHOLE);
        progress.setProgress(status.of() == 0 ? 0 : (int) (WHOLE * status.done() / status.of()));
        Words.Remedy remedy = Words.remedy(status);
        Page.set(getWindow().getDecorView(), R.id.notice_action, switch (remedy) {
            case NONE -> "";
            case TRY_AGAIN -> words.text(R.string.try_again);
            case MODELS -> words.text(R.string.choose_model);
            case SETTINGS -> words.text(R.string.change_settings);
        });
        showButton(status);
    }

    @Override
    public void changed() {
        for (Side side : Side.values()) {
            View panel = panels.get(side);
            Answer end = writing.end(side);
            panel.setVisibility(writing.hasBegun(side) ? View.VISIBLE : View.GONE);
            boolean isCompared = writing.hasBegun(Side.BASE);
            Page.set(panel, R.id.title, isCompared ? words.text(side == Side.PERSONAL ? R.string.personal : R.string.base) : "");
            Page.set(panel, R.id.text, writing.text(side));
            Page.set(panel, R.id.end, end == null ? "" : words.of(end));
            panel.findViewById(R.id.actions).setVisibility(end == null || writing.text(side).isEmpty() ? View.GONE : View.VISIBLE);
        }
        showButton(session.status());
    }

    private void showButton(Status status) {
        // A dark phone would end the answer, or the copy.
        write.setKeepScreenOn(writing.isRunning() || status.stage() == Status.Stage.COPYING);
        write.setText(writing.isRunning() ? R.string.stop : R.string.write);
        write.setEnabled(writing.isRunning() || status.isReady());
        write.setAlpha(write.isEnabled() ? 1 : 0.5f);
    }

    private void offerTasks() {
        List<String> names = new ArrayList<>();
        for (Preset preset : presets) {
            names.add(preset.task().replace('_', ' '));
        }
        names.add(words.text(R.string.task_free));
        var adapter = new ArrayAdapter<>(this, android.R.layout.simple_spinner_item, names);
        adapter.setDropDownViewResource(android.R.layout.simple_spinner_dropdown_item);
        tasks.setAdapter(adapter);
        tasks.setSelection(Math.min(wanted, names.size() - 1));
    }

    // What is done.

    private void ask() {
        String text = input.getText().toString();
        if (text.trim().isEmpty()) {
            input.requestFocus();
            return;
        }
        int task = tasks.getSelectedItemPosition();
        String asked = task < presets.size() ? presets.get(task).asked(text) : text.trim();
        // What comes is below; the keyboard would cover it.
        getSystemService(InputMethodManager.class).hideSoftInputFromWindow(input.getWindowToken(), 0);
        ScrollView scroll = findViewById(R.id.scroll);
        scroll.post(() -> scroll.smoothScrollTo(0, write.getTop()));
        boolean both = compare.getVisibility() == View.VISIBLE && compare.isChecked();
        writing.write(asked, session.settings().answerTokens(), session.settings().temperature(), both);
    }

    private void help() {
        switch (Words.remedy(session.status())) {
            case TRY_AGAIN -> session.restart();
            case MODELS -> startActivity(new Intent(this, ModelsActivity.class));
            case SETTINGS -> startActivity(new Intent(this, SettingsActivity.class));
            case NONE -> {}
        }
    }

    private void copy(String text) {
        getSystemService(ClipboardManager.class).setPrimaryClip(ClipData.newPlainText(words.text(R.string.app_name), text));
        if (Build.VERSION.SDK_INT < Build.VERSION_CODES.TIRAMISU) { // newer ones say so themselves
            Toast.makeText(this, R.string.copied, Toast.LENGTH_SHORT).show();
        }
    }

    private void share(String text) {
        Intent send = new Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, text);
        startActivity(Intent.createChooser(send, words.text(R.string.share)));
    }
}
