package org.cdcda.app;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;

import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.List;
import org.cdcda.app.Fakes.FakeDevice;
import org.cdcda.app.Fakes.FakeEngine;
import org.cdcda.app.Fakes.FakePackage;
import org.cdcda.app.Fakes.FakeSettings;
import org.cdcda.app.Status.Stage;
import org.cdcda.app.device.Memory;
import org.cdcda.app.engine.EngineState;
import org.cdcda.app.engine.EngineState.Failure;
import org.cdcda.app.engine.EngineState.Phase;
import org.cdcda.app.model.BundleException;
import org.cdcda.app.model.Model;
import org.cdcda.app.model.ModelStore;
import org.cdcda.app.model.StoreException;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

/** From an opened app to a model that answers, and everything that can come between. */
public class SessionTest {
    @Rule
    public final TemporaryFolder folder = new TemporaryFolder();

    private final FakeEngine engine = new FakeEngine();
    private final FakeDevice device = new FakeDevice();
    private final FakeSettings settings = new FakeSettings();
    private final Deque<Runnable> later = new ArrayDeque<>();
    private final List<Stage> stages = new ArrayList<>();
    private Session session;
    private long room = 1L << 40;

    private void open(ModelStore.Source packaged) {
        var store = new ModelStore(new File(folder.getRoot(), "own"), new File(folder.getRoot(), "pushed"), () -> room);
        session = new Session(store, packaged, engine, device, settings, later::add, Runnable::run);
        session.watch(status -> stages.add(status.stage()));
        session.open();
    }

    private void work() {
        while (!later.isEmpty()) {
            later.poll().run();
        }
    }

    @Test
    public void thePackagesModelIsUnpackedOnceAndLoaded() {
        open(new FakePackage(false));
        assertEquals(Stage.LOOKING, session.status().stage());
        work();
        assertEquals(List.of(Stage.LOOKING, Stage.LOOKING, Stage.COPYING, Stage.CHECKING, Stage.ENGINE, Stage.ENGINE), stages);
        assertTrue(session.status().isBusy());
        engine.become(Phase.READY);
        assertTrue(session.status().isReady());
        assertEquals(2, engine.loaded.get(0).threads());
        assertEquals(0b1100_0000, engine.loaded.get(0).cores());
        assertEquals(2048, engine.loaded.get(0).context());
        stages.clear();
        session.restart();
        work();
        assertFalse(stages.contains(Stage.COPYING));
        assertEquals(2, engine.loaded.size());
    }

    @Test
    public void settingsAreUsed() {
        settings.setThreads(1);
        settings.setContext(512);
        open(new FakePackage(true));
        work();
        assertEquals(1, engine.loaded.get(0).threads());
        assertEquals(512, engine.loaded.get(0).context());
        assertTrue(engine.loaded.get(0).adapter().exists());
    }

    @Test
    public void withoutAModelItSaysSo() {
        open(null);
        work();
        assertEquals(Stage.NO_MODEL, session.status().stage());
        session.add(new FakePackage(false), "picked");
        work();
        assertEquals(Stage.ENGINE, session.status().stage());
        assertEquals(Model.Origin.IMPORTED, session.status().model().origin());
    }

    @Test
    public void aBundleThatTheAppCannotRunIsRefusedWithItsReason() {
        open(new FakePackage(false).with("format", "onnx"));
        work();
        assertEquals(Stage.UNUSABLE, session.status().stage());
        assertEquals(BundleException.Problem.NOT_GGUF, session.status().refusal());
        assertEquals("onnx", session.status().detail());
    }

    @Test
    public void aDamagedPackageIsNotLoaded() {
        var packaged = new FakePackage(false);
        packaged.files.replaceAll((name, content) -> name.endsWith(".gguf") ? "other weights!!!".getBytes() : content);
        open(packaged);
        work();
        assertEquals(Stage.NOT_COPIED, session.status().stage());
        assertEquals(StoreException.Problem.DAMAGED, session.status().trouble());
        assertTrue(engine.loaded.isEmpty());
    }

    @Test
    public void aModelThatDoesNotFitIsRefusedBeforeItIsLoaded() {
        device.memory = 1_390_000_000; // an app may take 190 MB of it, and the model needs 200
        open(new FakePackage(false));
        work();
        assertEquals(Stage.TOO_LARGE, session.status().stage());
        assertFalse(stages.contains(Stage.COPYING));
        assertTrue(engine.loaded.isEmpty());
        session.add(new FakePackage(true), "picked");
        work();
        assertEquals("picked", session.status().model().name());
        assertEquals(0, session.store().list().models().size());
        settings.setContext(256);
        session.restart();
        work();
        assertEquals(Stage.ENGINE, session.status().stage());
        assertEquals("picked", session.status().model().name());
        assertEquals(Memory.Verdict.FITS, session.verdict(session.status().model()));
    }

    @Test
    public void aPickWithoutRoomIsCopiedWhenThereIsSome() {
        open(new FakePackage(false));
        work();
        room = 0;
        session.add(new FakePackage(true), "picked");
        work();
        assertEquals(StoreException.Problem.NO_SPACE, session.status().trouble());
        room = 1L << 40;
        session.restart();
        work();
        assertEquals("picked", session.status().model().name());
    }

    @Test
    public void aPickThatCannotBeReadIsTriedAgain() {
        open(null);
        work();
        var files = new FakePackage(false);
        boolean[] isBroken = {true};
        session.add((name, skipped) -> {
            if (isBroken[0]) {
                throw new IOException("the card was taken out");
            }
            return files.open(name, skipped);
        }, "picked");
        work();
        assertEquals(Stage.NOT_COPIED, session.status().stage());
        isBroken[0] = false;
        session.restart();
        work();
        assertEquals("picked", session.status().model().name());
    }

    @Test
    public void aPickThatIsRefusedOrLacksAFileIsForgotten() {
        open(new FakePackage(false));
        work();
        var lacking = new FakePackage(true);
        lacking.files.remove("adapter.gguf");
        var damaged = new FakePackage(true);
        damaged.files.put("adapter.gguf", new byte[22]);
        for (FakePackage hopeless : List.of(lacking, damaged, new FakePackage(true).with("schema", 1))) {
            session.add(hopeless, "picked");
            work();
            assertTrue(session.status().stage() == Stage.NOT_COPIED || session.status().stage() == Stage.UNUSABLE);
            session.restart();
            work();
            assertEquals(ModelStore.BUNDLED, session.status().model().name());
        }
    }

    @Test
    public void anotherModelThatIsUsedOrADeletionTakesThePlaceOfAPickWithoutRoom() {
        open(new FakePackage(false));
        work();
        Model bundled = session.status().model();
        room = 0;
        session.add(new FakePackage(true), "picked");
        work();
        session.use(bundled);
        work();
        assertEquals(bundled, session.status().model());
        session.add(new FakePackage(true), "picked");
        work();
        assertEquals(Stage.NOT_COPIED, session.status().stage());
        session.delete(session.store().folder("picked"));
        work();
        assertEquals(bundled, session.status().model());
    }

    @Test
    public void aModelThatWasPushedIsSeenWithoutLeavingTheApp() throws Exception {
        open(null);
        work();
        stages.clear();
        session.lookAgain();
        work();
        assertEquals(List.of(), stages); // nothing new
        File there = push();
        session.lookAgain();
        work();
        assertEquals(Stage.UNUSABLE, session.status().stage()); // it is on its way
        Files.write(there.toPath().resolve("bundle.json"), new FakePackage(false).files.get("bundle.json"));
        session.lookAgain();
        work();
        assertEquals(Model.Origin.PUSHED, session.status().model().origin());
        assertEquals(1, engine.loaded.size());
        session.lookAgain();
        session.open();
        assertTrue(later.isEmpty()); // it is there: nothing is looked for
    }

    @Test
    public void openingAgainLooksAgainWhereThereWasNoModel() throws Exception {
        open(null);
        work();
        File there = push();
        Files.write(there.toPath().resolve("bundle.json"), new FakePackage(false).files.get("bundle.json"));
        session.open();
        work();
        assertEquals(Model.Origin.PUSHED, session.status().model().origin());
    }

    @Test
    public void whatCannotBeUsedIsNotSpokenOfWhenItIsDeleted() throws Exception {
        File there = push();
        open(null);
        work();
        assertEquals(Stage.UNUSABLE, session.status().stage());
        session.delete(there);
        work();
        assertEquals(Stage.NO_MODEL, session.status().stage());
    }

    /** A push without its last file. */
    private File push() throws IOException {
        File there = folder.newFolder("pushed", "42");
        for (var file : new FakePackage(false).files.entrySet()) {
            if (!file.getKey().equals("bundle.json")) {
                Files.write(there.toPath().resolve(file.getKey()), file.getValue());
            }
        }
        return there;
    }

    @Test
    public void aFailureIsTheStatusUntilItBeginsAnew() {
        open(new FakePackage(false));
        work();
        engine.become(EngineState.failed(Failure.DIED, "segmentation fault"));
        assertEquals(Failure.DIED, session.status().engine().failure());
        assertFalse(session.status().isReady());
        session.restart();
        work();
        engine.become(Phase.READY);
        assertTrue(session.status().isReady());
    }

    @Test
    public void whatAnOlderWishFoundIsNotTold() {
        open(new FakePackage(false));
        Runnable old = later.poll();
        session.close();
        old.run();
        assertEquals(Stage.LOOKING, session.status().stage());
        assertTrue(engine.loaded.isEmpty());
        session.open();
        work();
        assertEquals(1, engine.loaded.size());
    }

    @Test
    public void aDeletedModelGivesItsPlaceToAnother() {
        open(new FakePackage(false));
        work();
        session.add(new FakePackage(true), "picked");
        work();
        assertEquals("picked", session.status().model().name());
        session.delete(session.status().model().folder());
        work();
        assertEquals(ModelStore.BUNDLED, session.status().model().name());
        session.use(session.status().model());
        work();
        assertEquals("BUNDLED/" + ModelStore.BUNDLED, settings.model());
    }

    @Test
    public void aPickThatWasInterruptedGoesOnWhenTheAppIsSeenAgain() {
        open(null);
        work();
        session.add(new FakePackage(false), "picked");
        session.close();
        work();
        assertTrue(engine.loaded.isEmpty());
        session.open();
        work();
        assertEquals("picked", session.status().model().name());
    }

    @Test
    public void aPackageThatCannotBeUnpackedIsNoReasonAgainstTheChosenModel() {
        open(new FakePackage(false).with("schema", 1));
        work();
        assertEquals(Stage.UNUSABLE, session.status().stage());
        session.add(new FakePackage(false), "picked");
        work();
        assertEquals("picked", session.status().model().name());
        session.restart();
        work();
        assertEquals(Stage.ENGINE, session.status().stage());
    }
}
