package org.cdcda.app.ui;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;

import android.app.Activity;
import android.content.ComponentCallbacks2;
import android.content.Intent;
import android.net.Uri;
import android.os.Looper;
import android.view.View;
import android.widget.EditText;
import android.widget.Spinner;
import android.widget.Switch;
import android.widget.TextView;
import java.io.File;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import org.cdcda.app.Fakes.FakePackage;
import org.cdcda.app.R;
import org.cdcda.app.Status;
import org.cdcda.app.Status.Stage;
import org.cdcda.app.engine.Answer;
import org.cdcda.app.engine.Answer.End;
import org.cdcda.app.engine.Answer.Timings;
import org.cdcda.app.engine.EngineState;
import org.cdcda.app.engine.EngineState.Failure;
import org.cdcda.app.engine.EngineState.Phase;
import org.cdcda.app.model.Bundle;
import org.cdcda.app.model.BundleException;
import org.cdcda.app.model.Model;
import org.cdcda.app.model.StoreException;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.ParameterizedRobolectricTestRunner;
import org.robolectric.Robolectric;
import org.robolectric.RuntimeEnvironment;
import org.robolectric.Shadows;
import org.robolectric.android.controller.ActivityController;
import org.robolectric.annotation.Config;
import org.robolectric.annotation.GraphicsMode;
import org.robolectric.shadows.ShadowAlertDialog;

/** Every screen in every state: drawn, looked at, and nothing cut off, too pale, too small or without a name. */
@RunWith(ParameterizedRobolectricTestRunner.class)
@Config(sdk = 34, application = TestApp.class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
public class ScreensTest {
    private static final Answer WHOLE = new Answer(End.COMPLETE, "", new Timings(31, 310, 17, 42.5));
    private static final String LONG = "The lock keeper of the old canal, who has slept until nine since the war, was found awake at dawn by three geese.";

    private final String look;
    private final String qualifiers;
    private final float letters;

    public ScreensTest(String look, String qualifiers, float letters) {
        this.look = look;
        this.qualifiers = qualifiers;
        this.letters = letters;
    }

    @ParameterizedRobolectricTestRunner.Parameters(name = "{0}")
    public static List<Object[]> looks() {
        return List.of(
                new Object[] {"light", "en-rUS-w360dp-h640dp-notnight-xhdpi", 1f},
                new Object[] {"dark", "en-rUS-w360dp-h640dp-night-xhdpi", 1f},
                new Object[] {"large", "en-rUS-w360dp-h640dp-notnight-xhdpi", 2f},
                new Object[] {"landscape", "en-rUS-w640dp-h360dp-land-notnight-xhdpi", 1f},
                new Object[] {"chinese", "zh-rCN-w360dp-h640dp-notnight-xhdpi", 1f},
                new Object[] {"small", "en-rUS-w320dp-h480dp-notnight-hdpi", 1.3f});
    }

    private static TestApp app() {
        return (TestApp) RuntimeEnvironment.getApplication();
    }

    private <A extends Activity> ActivityController<A> open(Class<A> screen) {
        RuntimeEnvironment.setQualifiers(qualifiers);
        RuntimeEnvironment.setFontScale(letters);
        return Robolectric.buildActivity(screen).setup();
    }

    private void look(Activity activity, String name) {
        assertEquals(look + " " + name, List.of(), Inspection.of(activity, look + "-" + name));
    }

    private static String said(Activity activity, int id) {
        TextView view = activity.findViewById(id);
        return view.isShown() ? view.getText().toString() : "";
    }

    /** Every status that the session can tell, by name. */
    private static Map<String, Status> statuses(Model model) {
        Map<String, Status> all = new LinkedHashMap<>();
        for (Stage stage : Stage.values()) {
            switch (stage) {
                case LOOKING, COPYING, NO_MODEL -> put(all, stage, "", new Status(stage, null, 41_000_000, 145_000_000, EngineState.ABSENT, null, null, ""));
                case CHECKING, DAMAGED, TOO_LARGE -> put(all, stage, "", new Status(stage, model, 0, 0, EngineState.ABSENT, null, null, ""));
                case UNUSABLE -> {
                    for (BundleException.Problem problem : BundleException.Problem.values()) {
                        put(all, stage, problem, new Status(stage, null, 0, 0, EngineState.ABSENT, problem, null, "onnx"));
                    }
                }
                case NOT_COPIED -> {
                    put(all, stage, "other", new Status(stage, null, 0, 0, EngineState.ABSENT, null, null, "/storage/emulated/0: read failed: EIO"));
                    for (StoreException.Problem problem : StoreException.Problem.values()) {
                        put(all, stage, problem, new Status(stage, null, 0, 97_000_000, EngineState.ABSENT, null, problem, "base-q8_0.gguf"));
                    }
                }
                case ENGINE -> {
                    for (Phase phase : List.of(Phase.LOADING, Phase.READY, Phase.GENERATING)) {
                        put(all, stage, phase, new Status(stage, model, 0, 0, EngineState.of(phase), null, null, ""));
                    }
                    for (Failure failure : Failure.values()) {
                        if (failure != Failure.NONE) {
                            EngineState failed = EngineState.failed(failure, "error: unknown architecture 'x'");
                            put(all, stage, failure, new Status(stage, model, 0, 0, failed, null, null, ""));
                        }
                    }
                }
            }
        }
        return all;
    }

    private static void put(Map<String, Status> all, Stage stage, Object more, Status status) {
        all.put((more.equals("") ? "" + stage : stage + "-" + more).toLowerCase(Locale.ROOT), status);
    }

    @Test
    public void theWritingScreenSaysEverythingThatCanHappen() {
        WritingActivity activity = open(WritingActivity.class).get();
        List<String> sentences = new ArrayList<>();
        statuses(app().session().status().model()).forEach((name, status) -> {
            activity.changed(status);
            String sentence = said(activity, R.id.notice_text);
            assertEquals(name, status.isReady(), sentence.isEmpty());
            assertFalse(name + ": " + sentence, sentences.contains(sentence));
            sentences.add(sentence);
            assertEquals(name, status.isReady(), activity.findViewById(R.id.write).isEnabled());
            assertEquals(name, status.stage() == Stage.COPYING, activity.findViewById(R.id.write).getKeepScreenOn());
            look(activity, name);
        });
        app().engine.become(EngineState.failed(Failure.DIED, ""));
        activity.findViewById(R.id.notice_action).performClick(); // try again
        assertEquals(Phase.LOADING, app().engine.state().phase());
        app().engine.become(Phase.READY);
        assertEquals("", said(activity, R.id.notice_text));
        assertTrue(activity.findViewById(R.id.write).isEnabled());
    }

    @Test
    public void anAnswerComesPieceByPieceAndTheBaseModelsBesideIt() {
        WritingActivity activity = open(WritingActivity.class).get();
        app().engine.become(Phase.READY);
        ((EditText) activity.findViewById(R.id.input)).setText(LONG);
        ((Spinner) activity.findViewById(R.id.task)).setSelection(1);
        ((Switch) activity.findViewById(R.id.compare)).setChecked(true);
        View write = activity.findViewById(R.id.write);
        write.performClick();
        assertEquals("Rewrite: " + LONG, app().engine.asked.get(0).text());
        app().engine.sink.piece("Three geese, ");
        look(activity, "writing");
        write.performClick();
        assertTrue(app().engine.stopped);
        app().engine.answer("", new Answer(End.STOPPED, "", Timings.NONE));
        write.performClick();
        app().engine.answer("Three geese, one lock keeper, and nobody slept.", WHOLE);
        app().engine.answer("Lock keeper found awake at dawn. " + LONG, new Answer(End.CUT, "", new Timings(31, 310, 128, 41)));
        look(activity, "compared");
        for (End end : End.values()) {
            write.performClick();
            app().engine.answer("x", new Answer(end, "the request exceeds the context", Timings.NONE));
            if (end == End.COMPLETE || end == End.CUT) {
                app().engine.answer("y", WHOLE);
            }
        }
        assertFalse(app().writing().isRunning());
        look(activity, "failed-answer");
    }

    @Test
    public void whatIsWrittenSurvivesATurnedPhone() {
        ActivityController<WritingActivity> controller = open(WritingActivity.class);
        app().engine.become(Phase.READY);
        ((EditText) controller.get().findViewById(R.id.input)).setText("turn");
        controller.get().findViewById(R.id.write).performClick();
        app().engine.sink.piece("half ");
        WritingActivity turned = controller.recreate().get();
        app().engine.answer("whole", WHOLE);
        assertEquals("half whole", said(turned, R.id.text));
        assertEquals("turn", said(turned, R.id.input));
    }

    @Test
    public void everyWayToHaveNoModelHasItsSentence() {
        Map<String, Consumer<TestApp>> ways = new LinkedHashMap<>();
        ways.put("no-model", app -> app.packaged = null);
        ways.put("other-version", app -> app.packaged = new FakePackage(true).with("schema", 1));
        ways.put("not-gguf", app -> app.packaged = new FakePackage(true).with("format", "onnx"));
        ways.put("damaged", app -> app.packaged.files.put("adapter.gguf", new byte[22]));
        ways.put("too-large", app -> app.device.memory = 1_300_000_000);
        for (var way : ways.entrySet()) {
            TestApp fresh = app();
            fresh.packaged = new FakePackage(true);
            fresh.device.memory = 8_000_000_000L;
            fresh.forget();
            way.getValue().accept(fresh);
            WritingActivity activity = open(WritingActivity.class).get();
            assertFalse(way.getKey(), said(activity, R.id.notice_text).isEmpty());
            assertFalse(way.getKey(), said(activity, R.id.notice_action).isEmpty());
            activity.finish();
        }
    }

    @Test
    public void theOtherScreens() {
        app().session().open();
        app().engine.become(Phase.READY);
        look(open(ModelsActivity.class).get(), "models");
        AboutActivity about = open(AboutActivity.class).get();
        for (Bundle.Part part : app().session().status().model().bundle().files().values()) {
            assertEquals(part.name(), 1, views(about, part.sha256()).size());
        }
        look(about, "about");
        look(open(SettingsActivity.class).get(), "settings");
    }

    @Test
    public void theBenchmarkRunsIsCutAndFails() throws Exception {
        app().session().open();
        app().engine.become(Phase.READY);
        ActivityController<BenchmarkActivity> controller = open(BenchmarkActivity.class);
        BenchmarkActivity screen = controller.get();
        look(screen, "benchmark");
        app().writing().write("elsewhere", 64, 0, false);
        look(screen, "benchmark-busy");
        app().engine.answer("", WHOLE);
        app().benchmark().run(0);
        for (int at = 0; at < 8; at++) {
            app().engine.meter.measured(new Timings(256, 310 - at, 64, 42.5 - at));
        }
        look(screen, "benchmark-running");
        screen = controller.recreate().get();
        assertFalse(app().engine.stopped);
        end(true, "");
        look(screen, "benchmark-done");
        assertEquals(0, views(screen, text(screen, R.string.benchmark_cut)).size());
        export(screen);

        views(screen, text(screen, R.string.export_json)).get(0).performClick();
        Intent asked = Shadows.shadowOf(screen).getNextStartedActivityForResult().intent;
        controller.pause().stop();
        Uri nowhere = Uri.fromFile(new File("/no/such/folder/benchmark.json"));
        Shadows.shadowOf(screen).receiveResult(asked, Activity.RESULT_OK, new Intent().setData(nowhere)); // before it is seen again
        controller.restart().resume();
        assertEquals(1, views(screen, "/no/such/folder").size());
        look(screen, "benchmark-unsaved");

        app().benchmark().run(2);
        app().engine.meter.measured(new Timings(256, 310, 64, 42.5));
        controller.pause().stop();
        assertTrue(app().engine.stopped);
        end(false, "");
        controller.restart().resume();
        assertEquals(1, views(screen, text(screen, R.string.benchmark_cut)).size());
        look(screen, "benchmark-cut");
        app().benchmark().run(0);
        end(false, "the engine closed the connection");
        look(screen, "benchmark-failed");
    }

    private static void end(boolean complete, String detail) {
        app().engine.become(Phase.READY);
        app().engine.meter.done(complete, detail);
    }

    /** Over an older file that is longer. */
    private static void export(Activity screen) throws Exception {
        views(screen, text(screen, R.string.export_json)).get(0).performClick();
        Path file = Files.createTempFile("benchmark", ".json");
        Files.writeString(file, "{\"older\": \"" + "x".repeat(5000) + "\"}");
        Intent asked = Shadows.shadowOf(screen).getNextStartedActivityForResult().intent;
        Shadows.shadowOf(screen).receiveResult(asked, Activity.RESULT_OK, new Intent().setData(Uri.fromFile(file.toFile())));
        String written = Files.readString(file);
        assertEquals(app().benchmark().json(), written);
        Files.delete(file);
    }

    private static String text(Activity activity, int id) {
        return activity.getString(id);
    }

    /** Returns the views that show a text. */
    private static List<View> views(Activity activity, String text) {
        var found = new ArrayList<View>();
        activity.getWindow().getDecorView().findViewsWithText(found, text, View.FIND_VIEWS_WITH_TEXT);
        found.removeIf(view -> !view.isShown());
        return found;
    }

    @Test
    public void modelsFromEverywhereAndWhatIsNone() throws Exception {
        app().session().open();
        app().session().add(new FakePackage(true), "picked");
        lay("42-gguf-lora", new FakePackage(true));
        lay("7-onnx", new FakePackage(true).with("format", "onnx"));
        assertTrue(new File(app().pushed(), "half").mkdir());
        app().engine.become(Phase.READY);
        ActivityController<ModelsActivity> controller = open(ModelsActivity.class);
        ModelsActivity screen = controller.get();
        assertEquals(4, views(screen, text(screen, R.string.delete)).size()); // all but the package's
        assertEquals(3, views(screen, text(screen, R.string.origin_pushed)).size());
        look(screen, "models-all");
        views(screen, text(screen, R.string.delete)).get(0).performClick();
        var question = ShadowAlertDialog.getLatestDialog();
        assertTrue(question.isShowing());
        screen = controller.recreate().get();
        assertFalse(question.isShowing());
        for (var one : statuses(app().session().status().model()).entrySet()) {
            screen.changed(one.getValue());
            assertEquals(one.getKey(), one.getValue().stage() == Stage.COPYING, screen.findViewById(R.id.content).getKeepScreenOn());
        }
    }

    private static void lay(String name, FakePackage model) throws Exception {
        Path there = Files.createDirectories(app().pushed().toPath().resolve(name));
        for (var file : model.files.entrySet()) {
            Files.write(there.resolve(file.getKey()), file.getValue());
        }
    }

    @Test
    public void aCopyThatGoesOnIsNoBrokenModel() {
        app().session().open();
        assertTrue(app().session().store().folder("picked").mkdir()); // it was interrupted
        ModelsActivity screen = open(ModelsActivity.class).get();
        String delete = text(screen, R.string.delete);
        assertEquals(1, views(screen, delete).size());
        List<Integer> seen = new ArrayList<>();
        app().session().watch(status -> {
            if (status.stage() == Stage.COPYING) {
                seen.add(views(screen, delete).size());
                look(screen, "models-copying");
            }
        });
        app().session().add(new FakePackage(true), "picked");
        assertFalse(seen.isEmpty());
        assertEquals(0, Collections.frequency(seen, 1));
        assertEquals(1, views(screen, delete).size());
    }

    @Test
    public void aShellWaitsForAModel() throws Exception {
        app().packaged = null;
        WritingActivity activity = open(WritingActivity.class).get();
        assertEquals(text(activity, R.string.stage_no_model), said(activity, R.id.notice_text));
        lay("42-gguf", new FakePackage(false));
        Shadows.shadowOf(Looper.getMainLooper()).idleFor(4, TimeUnit.SECONDS);
        assertEquals(text(activity, R.string.engine_loading), said(activity, R.id.notice_text));
    }

    @Test
    public void memoryIsGivenBackOutOfSightAlone() {
        ActivityController<WritingActivity> controller = open(WritingActivity.class);
        app().engine.become(Phase.READY);
        app().onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_COMPLETE);
        assertEquals(Phase.READY, app().engine.state().phase());
        controller.pause().stop();
        app().onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_UI_HIDDEN);
        assertEquals(Phase.READY, app().engine.state().phase());
        app().onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_BACKGROUND);
        assertEquals(Phase.ABSENT, app().engine.state().phase());
        controller.restart();
        app().engine.become(Phase.READY);
        controller.stop();
        Shadows.shadowOf(Looper.getMainLooper()).idleFor(31, TimeUnit.SECONDS);
        assertEquals(Phase.ABSENT, app().engine.state().phase());
    }
}
