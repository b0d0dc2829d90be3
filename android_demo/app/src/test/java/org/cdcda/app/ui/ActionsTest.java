package org.cdcda.app.ui;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;

import android.app.Activity;
import android.app.AlertDialog;
import android.content.ClipData;
import android.content.ClipboardManager;
import android.content.ComponentName;
import android.content.Context;
import android.content.Intent;
import android.net.Uri;
import android.view.View;
import android.view.ViewGroup;
import android.widget.EditText;
import android.widget.SeekBar;
import java.io.ByteArrayInputStream;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.cdcda.app.Fakes.FakePackage;
import org.cdcda.app.R;
import org.cdcda.app.Settings;
import org.cdcda.app.engine.Answer;
import org.cdcda.app.engine.Answer.End;
import org.cdcda.app.engine.Answer.Timings;
import org.cdcda.app.engine.EngineState.Phase;
import org.cdcda.app.model.Model;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.Robolectric;
import org.robolectric.RobolectricTestRunner;
import org.robolectric.RuntimeEnvironment;
import org.robolectric.Shadows;
import org.robolectric.android.controller.ActivityController;
import org.robolectric.annotation.Config;
import org.robolectric.shadows.ShadowAlertDialog;

/** What every button does. */
@RunWith(RobolectricTestRunner.class)
@Config(sdk = 34, application = TestApp.class)
public class ActionsTest {

    private static TestApp app() {
        return (TestApp) RuntimeEnvironment.getApplication();
    }

    private static <A extends Activity> A open(Class<A> screen) {
        return Robolectric.buildActivity(screen).setup().get();
    }

    private static void click(Activity activity, int text, int which) {
        var found = new ArrayList<View>();
        activity.getWindow().getDecorView().findViewsWithText(found, activity.getString(text), View.FIND_VIEWS_WITH_TEXT);
        found.removeIf(view -> !view.isShown() || !view.isClickable());
        found.get(which).performClick();
    }

    @Test
    public void anAnswerIsCopiedAndShared() {
        WritingActivity screen = open(WritingActivity.class);
        app().engine.become(Phase.READY);
        ((EditText) screen.findViewById(R.id.input)).setText("geese");
        screen.findViewById(R.id.write).performClick();
        app().engine.answer("Three geese.", new Answer(End.COMPLETE, "", Timings.NONE));
        click(screen, R.string.copy, 0);
        ClipData copied = screen.getSystemService(ClipboardManager.class).getPrimaryClip();
        assertEquals("Three geese.", copied.getItemAt(0).getText());
        click(screen, R.string.share, 0);
        Intent chooser = Shadows.shadowOf(screen).getNextStartedActivity();
        Intent shared = chooser.getParcelableExtra(Intent.EXTRA_INTENT, Intent.class);
        assertEquals("Three geese.", shared.getStringExtra(Intent.EXTRA_TEXT));
    }

    @Test
    public void nothingIsAskedWithoutAText() {
        WritingActivity screen = open(WritingActivity.class);
        app().engine.become(Phase.READY);
        ((EditText) screen.findViewById(R.id.input)).setText(" \n");
        screen.findViewById(R.id.write).performClick();
        assertEquals(List.of(), app().engine.asked);
    }

    @Test
    public void theMenuLeadsToEveryScreen() {
        WritingActivity screen = open(WritingActivity.class);
        Map<Integer, Class<?>> screens = Map.of(
                R.id.models, ModelsActivity.class,
                R.id.about, AboutActivity.class,
                R.id.benchmark, BenchmarkActivity.class,
                R.id.settings, SettingsActivity.class);
        screens.forEach((item, there) -> {
            assertTrue(Shadows.shadowOf(screen).clickMenuItem(item));
            assertEquals(new ComponentName(screen, there), Shadows.shadowOf(screen).getNextStartedActivity().getComponent());
        });
    }

    @Test
    public void whatIsSetIsUsedAndReloadsTheModelWhereItHasTo() {
        app().session().open();
        Settings settings = app().session().settings();
        ActivityController<SettingsActivity> controller = Robolectric.buildActivity(SettingsActivity.class).setup();
        List<SeekBar> bars = bars(controller.get().findViewById(R.id.content));
        bars.get(2).setProgress(3);
        bars.get(3).setProgress(1);
        assertEquals(0.3, settings.temperature(), 1e-6);
        assertEquals(64, settings.answerTokens());
        int loads = app().engine.loaded.size();
        controller.pause().stop();
        assertEquals(loads, app().engine.loaded.size());
        controller.restart().resume();
        bars.get(0).setProgress(1);
        bars.get(1).setProgress(1);
        controller.pause().stop();
        assertEquals(loads + 1, app().engine.loaded.size());
        assertEquals(1, app().engine.loaded.get(loads).threads());
        assertEquals(1024, app().engine.loaded.get(loads).context());
        bars.get(1).setProgress(0);
        assertTrue(settings.context() >= 256 + 64); // or the benchmark would be refused
    }

    private static List<SeekBar> bars(ViewGroup where) {
        var found = new ArrayList<SeekBar>();
        for (int at = 0; at < where.getChildCount(); at++) {
            if (where.getChildAt(at) instanceof SeekBar bar) {
                found.add(bar);
            } else if (where.getChildAt(at) instanceof ViewGroup group) {
                found.addAll(bars(group));
            }
        }
        return found;
    }

    @Test
    public void whatIsSetIsKept() {
        Context context = app();
        var first = new Preferences(context);
        assertEquals("", first.model());
        assertEquals(0, first.threads() + first.context());
        first.setModel("PUSHED/42");
        first.setThreads(3);
        first.setContext(512);
        first.setTemperature(0.5f);
        first.setAnswerTokens(64);
        var second = new Preferences(context);
        assertEquals("PUSHED/42", second.model());
        assertEquals(3, second.threads());
        assertEquals(512, second.context());
        assertEquals(0.5, second.temperature(), 0);
        assertEquals(64, second.answerTokens());
    }

    @Test
    public void pickedFilesBecomeAModelThatIsUsedAndDeleted() {
        app().session().open();
        ModelsActivity screen = open(ModelsActivity.class);
        click(screen, R.string.pick_files, 0);
        Intent asked = Shadows.shadowOf(screen).getNextStartedActivityForResult().intent;
        assertTrue(asked.getBooleanExtra(Intent.EXTRA_ALLOW_MULTIPLE, false));
        Shadows.shadowOf(screen).receiveResult(asked, Activity.RESULT_OK, picked(new FakePackage(true)));
        assertEquals(Model.Origin.IMPORTED, used().origin());
        click(screen, R.string.use, 0);
        assertEquals(Model.Origin.BUNDLED, used().origin());
        click(screen, R.string.use, 1);
        assertEquals(Model.Origin.IMPORTED, used().origin());
        click(screen, R.string.delete, 0);
        assertTrue(used().folder().exists()); // it is asked first
        var question = (AlertDialog) ShadowAlertDialog.getLatestDialog();
        question.getButton(AlertDialog.BUTTON_POSITIVE).performClick();
        Shadows.shadowOf(app().getMainLooper()).idle();
        assertEquals(Model.Origin.BUNDLED, used().origin());
        assertFalse(app().session().store().folder("picked").exists());
    }

    private static Model used() {
        return app().session().status().model();
    }

    /** Lays files where another app offers them, and returns what the picker answers. */
    private static Intent picked(FakePackage files) {
        Robolectric.setupContentProvider(PickedFilesTest.Files.class, PickedFilesTest.FILES);
        ClipData chosen = null;
        for (var file : files.files.entrySet()) {
            Uri uri = Uri.parse("content://" + PickedFilesTest.FILES + "/" + file.getKey());
            Shadows.shadowOf(app().getContentResolver()).registerInputStreamSupplier(uri, () -> new ByteArrayInputStream(file.getValue()));
            var item = new ClipData.Item(uri);
            if (chosen == null) {
                chosen = new ClipData("", new String[] {"*/*"}, item);
            } else {
                chosen.addItem(item);
            }
        }
        var answer = new Intent();
        answer.setClipData(chosen);
        return answer;
    }

    @Test
    public void theBenchmarkIsStartedAndStopped() {
        app().session().open();
        app().engine.become(Phase.READY);
        BenchmarkActivity screen = open(BenchmarkActivity.class);
        click(screen, R.string.benchmark_start, 0);
        assertTrue(app().benchmark().isRunning());
        click(screen, R.string.stop, 0);
        assertTrue(app().engine.stopped);
    }
}
