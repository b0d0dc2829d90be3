package org.cdcda.app.ui;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;

import android.app.Activity;
import android.view.View;
import android.widget.EditText;
import android.widget.Spinner;
import android.widget.Switch;
import android.widget.TextView;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.function.Consumer;
import org.cdcda.app.Fakes.FakePackage;
import org.cdcda.app.R;
import org.cdcda.app.engine.Answer;
import org.cdcda.app.engine.Answer.End;
import org.cdcda.app.engine.Answer.Timings;
import org.cdcda.app.engine.EngineState;
import org.cdcda.app.engine.EngineState.Failure;
import org.cdcda.app.engine.EngineState.Phase;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.ParameterizedRobolectricTestRunner;
import org.robolectric.Robolectric;
import org.robolectric.RuntimeEnvironment;
import org.robolectric.android.controller.ActivityController;
import org.robolectric.annotation.Config;
import org.robolectric.annotation.GraphicsMode;

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

    private static void settle(Activity activity) {
        View decor = activity.getWindow().getDecorView();
        decor.measure(
                View.MeasureSpec.makeMeasureSpec(decor.getWidth(), View.MeasureSpec.EXACTLY),
                View.MeasureSpec.makeMeasureSpec(decor.getHeight(), View.MeasureSpec.EXACTLY));
        decor.layout(0, 0, decor.getWidth(), decor.getHeight());
    }

    private void look(Activity activity, String name) {
        settle(activity);
        assertEquals(look + " " + name, List.of(), Inspection.of(activity, look + "-" + name));
    }

    private static String said(Activity activity, int id) {
        TextView view = activity.findViewById(id);
        return view.isShown() ? view.getText().toString() : "";
    }

    @Test
    public void theWritingScreenSaysEverythingThatCanHappen() {
        ActivityController<WritingActivity> controller = open(WritingActivity.class);
        WritingActivity activity = controller.get();
        Map<String, EngineState> states = new LinkedHashMap<>();
        states.put("loading", EngineState.of(Phase.LOADING));
        for (Failure failure : Failure.values()) {
            if (failure != Failure.NONE) {
                states.put("failed-" + failure.name().toLowerCase(), EngineState.failed(failure, "error: unknown architecture 'x'"));
            }
        }
        List<String> sentences = new ArrayList<>();
        for (var state : states.entrySet()) {
            app().engine.become(state.getValue());
            String sentence = said(activity, R.id.notice_text);
            assertFalse(state.getKey(), sentence.isEmpty() || sentences.contains(sentence));
            sentences.add(sentence);
            assertFalse(activity.findViewById(R.id.write).isEnabled());
            look(activity, state.getKey());
        }
        activity.findViewById(R.id.notice_action).performClick(); // try again
        assertEquals(Phase.LOADING, app().engine.state().phase());
        app().engine.become(Phase.READY);
        assertEquals("", said(activity, R.id.notice_text));
        assertTrue(activity.findViewById(R.id.write).isEnabled());
        look(activity, "ready");
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
        app().engine.answer("one lock keeper, and nobody slept.", WHOLE);
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
            look(activity, way.getKey());
            activity.finish();
        }
    }

    @Test
    public void theOtherScreens() {
        app().session().open();
        app().engine.become(Phase.READY);
        look(open(ModelsActivity.class).get(), "models");
        look(open(AboutActivity.class).get(), "about");
        look(open(SettingsActivity.class).get(), "settings");
        BenchmarkActivity benchmark = open(BenchmarkActivity.class).get();
        look(benchmark, "benchmark");
        app().benchmark().run(0);
        for (int at = 0; at < 8; at++) {
            app().engine.meter.measured(new Timings(256, 310 - at, 64, 42.5 - at));
        }
        app().engine.become(Phase.READY);
        app().engine.meter.done("");
        look(benchmark, "benchmark-done");
    }
}
