package org.cdcda.app.model;

import static org.junit.Assert.assertArrayEquals;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertThrows;
import static org.junit.Assert.assertTrue;

import java.io.ByteArrayInputStream;
import java.io.File;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Random;
import org.cdcda.app.Fakes;
import org.cdcda.app.Shared;
import org.cdcda.app.model.Model.Origin;
import org.cdcda.app.model.StoreException.Problem;
import org.json.JSONObject;
import org.junit.Before;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

/** Models on the phone: copied whole or not at all, resumed, compared with their hashes. */
public class ModelStoreTest {
    private static final int BYTES = 1_000_000;

    @Rule
    public final TemporaryFolder folder = new TemporaryFolder();

    private final InMemory source = new InMemory();
    private long room = 1L << 40;
    private File own;
    private File pushed;
    private ModelStore store;

    /** A source in memory that counts what was read of the model. */
    private static final class InMemory implements ModelStore.Source {
        final Map<String, byte[]> files = new HashMap<>();
        long skippedLast;

        @Override
        public InputStream open(String name, long skipped) throws IOException {
            byte[] content = files.get(name);
            if (content == null) {
                throw new FileNotFoundException(name);
            }
            if (name.equals("model.gguf")) {
                skippedLast = skipped;
            }
            var in = new ByteArrayInputStream(content);
            in.skip(skipped);
            return in;
        }
    }

    @Before
    public void lay() throws Exception {
        own = new File(folder.getRoot(), "own");
        pushed = folder.newFolder("pushed");
        store = new ModelStore(own, pushed, () -> room);
        byte[] model = new byte[BYTES];
        new Random(1).nextBytes(model);
        source.files.put("model.gguf", model);
        source.files.put("LICENCES.txt", "Apache-2.0".getBytes(StandardCharsets.UTF_8));
        source.files.put("bundle.json", bundle(model).toString().getBytes(StandardCharsets.UTF_8));
    }

    private static JSONObject bundle(byte[] model) throws Exception {
        JSONObject json = new JSONObject(Shared.read("bundle.json")).put("format", "gguf");
        JSONObject files = json.getJSONObject("files");
        files.remove("adapter");
        String hash = HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(model));
        files.getJSONObject("model").put("file", "model.gguf").put("bytes", model.length).put("sha256", hash);
        return json;
    }

    private Model install() throws Exception {
        return store.install(source, "bundled", (done, of) -> {}, () -> false);
    }

    @Test
    public void aModelIsCopiedOnceAndIsThere() throws Exception {
        assertTrue(store.isNew(source, "bundled"));
        List<Long> told = new ArrayList<>();
        Model model = store.install(source, "bundled", (done, of) -> told.add(done), () -> false);
        assertArrayEquals(source.files.get("model.gguf"), Files.readAllBytes(model.file(Bundle.MODEL).toPath()));
        assertEquals(BYTES, (long) told.get(told.size() - 1));
        assertFalse(store.isNew(source, "bundled"));
        assertEquals(List.of(model), store.list().models());
        assertEquals(Origin.BUNDLED, model.origin());
        store.delete(model.folder());
        assertEquals(List.of(), store.list().models());
        assertFalse(model.folder().exists());
    }

    @Test
    public void aCopyThatWasStoppedGoesOnAndIsNoModelBefore() throws Exception {
        long[] arrived = {0};
        var stopped = assertThrows(
                StoreException.class,
                () -> store.install(source, "bundled", (done, of) -> arrived[0] = done, () -> arrived[0] > BYTES / 2));
        assertEquals(Problem.STOPPED, stopped.problem());
        assertEquals(List.of(), store.list().models());
        install();
        assertTrue(source.skippedLast >= BYTES / 2 && source.skippedLast < BYTES);
        assertEquals(1, store.list().models().size());
    }

    @Test
    public void aCopyWhoseBeginningWasDamagedIsMadeAnew() throws Exception {
        long[] arrived = {0};
        assertThrows(
                StoreException.class,
                () -> store.install(source, "bundled", (done, of) -> arrived[0] = done, () -> arrived[0] > BYTES / 2));
        File partial = new File(own, "bundled").listFiles()[0];
        Files.write(partial.toPath(), new byte[(int) partial.length()]); // the phone went dark before it was written
        List<Long> told = new ArrayList<>();
        Model model = store.install(source, "bundled", (done, of) -> told.add(done), () -> false);
        assertArrayEquals(source.files.get("model.gguf"), Files.readAllBytes(model.file(Bundle.MODEL).toPath()));
        assertEquals(BYTES, (long) told.get(told.size() - 1));
        assertEquals(BYTES, (long) Collections.max(told));
    }

    @Test
    public void anUpdateTakesThePlaceOfTheOldModel() throws Exception {
        install();
        byte[] other = new byte[BYTES / 2];
        source.files.put("model.gguf", other);
        source.files.put("bundle.json", bundle(other).put("quant", "q4_0").toString().getBytes(StandardCharsets.UTF_8));
        assertTrue(store.isNew(source, "bundled"));
        install();
        assertEquals("q4_0", store.list().models().get(0).bundle().quant());
    }

    @Test
    public void whatIsNotWhatTheBundleNamesIsNoModel() throws Exception {
        source.files.get("model.gguf")[7] ^= 1;
        assertEquals(Problem.DAMAGED, assertThrows(StoreException.class, this::install).problem());
        installAgain();
        source.files.remove("model.gguf");
        assertEquals(Problem.FILE_MISSING, assertThrows(StoreException.class, this::install).problem());
        source.files.remove("bundle.json");
        assertEquals(Problem.FILE_MISSING, assertThrows(StoreException.class, this::install).problem());
        assertEquals(1, store.list().models().size()); // the one that was there before
    }

    private void installAgain() throws Exception {
        source.files.get("model.gguf")[7] ^= 1;
        install();
    }

    @Test
    public void whatWasBegunOfAnotherModelIsNotContinued() throws Exception {
        long[] arrived = {0};
        assertThrows(
                StoreException.class,
                () -> store.install(source, "bundled", (done, of) -> arrived[0] = done, () -> arrived[0] > BYTES / 2));
        byte[] other = new byte[BYTES];
        source.files.put("model.gguf", other);
        source.files.put("bundle.json", bundle(other).toString().getBytes(StandardCharsets.UTF_8));
        assertArrayEquals(other, Files.readAllBytes(install().file(Bundle.MODEL).toPath()));
        assertEquals(3, new File(own, "bundled").list().length);
    }

    @Test
    public void withoutRoomItSaysHowMuchIsMissing() throws Exception {
        room = BYTES / 2;
        var full = assertThrows(StoreException.class, this::install);
        assertEquals(Problem.NO_SPACE, full.problem());
        assertEquals(BYTES / 2 + (32L << 20), full.bytes());
        assertEquals(new ModelStore.Found(List.of(), List.of()), store.list());
        room += full.bytes();
        install();
    }

    @Test
    public void roomIsAskedForAllFilesTogetherBeforeAnEarlierModelIsTouched() throws Exception {
        Model before = install();
        var both = new Fakes.FakePackage(true);
        long needed = 0;
        for (String name : List.of("base-q8_0.gguf", "adapter.gguf")) {
            needed += both.files.get(name).length;
        }
        long freed = 0;
        for (File file : before.folder().listFiles()) {
            freed += file.length();
        }
        room = (32L << 20) + needed - freed - 1;
        var full = assertThrows(StoreException.class, () -> store.install(both, "bundled", (done, of) -> {}, () -> false));
        assertEquals(1, full.bytes());
        assertEquals(List.of(before), store.list().models());
        room++;
        store.install(both, "bundled", (done, of) -> {}, () -> false);
        assertTrue(store.list().models().get(0).bundle().canCompare());
    }

    @Test
    public void whatIsThereOfACopyNeedsNoRoom() throws Exception {
        long[] arrived = {0};
        assertThrows(StoreException.class, () -> store.install(source, "bundled", (done, of) -> arrived[0] = done, () -> arrived[0] > BYTES / 2));
        room = (32L << 20) + BYTES - arrived[0];
        install();
    }

    @Test
    public void aCopyThatGoesOnIsNotListed() throws Exception {
        List<ModelStore.Found> seen = new ArrayList<>();
        store.install(source, "picked", (done, of) -> seen.add(store.list()), () -> false);
        assertEquals(new ModelStore.Found(List.of(), List.of()), seen.get(0));
        assertEquals(1, store.list().models().size());
    }

    @Test
    public void aPushedModelIsComparedOnceAndWhenItChanges() throws Exception {
        File there = new File(pushed, "42-gguf");
        assertTrue(there.mkdir());
        for (var file : source.files.entrySet()) {
            Files.write(there.toPath().resolve(file.getKey()), file.getValue());
        }
        Model model = store.list().models().get(0);
        assertEquals(Origin.PUSHED, model.origin());
        assertTrue(store.isIntact(model, () -> false));
        assertTrue(store.isIntact(model, () -> true)); // it is not read again: reading would be stopped
        byte[] other = source.files.get("model.gguf").clone();
        other[3] ^= 1;
        Files.write(model.file(Bundle.MODEL).toPath(), other);
        assertTrue(model.file(Bundle.MODEL).setLastModified(5_000_000));
        assertFalse(store.isIntact(model, () -> false));
        Files.write(model.file(Bundle.MODEL).toPath(), new byte[5]); // a push that was cut
        assertEquals(1, store.list().unusable().size());
    }

    @Test
    public void foldersThatAreNoModelsAreToldOfOrLeftAlone() throws Exception {
        assertTrue(new File(pushed, "half").mkdir());
        assertEquals(BundleException.Problem.INCOMPLETE, store.list().unusable().get(0).problem());
        Files.writeString(new File(pushed, "half/bundle.json").toPath(), "{\"schema\": 3, \"format\": \"onnx\"}");
        ModelStore.Unusable one = store.list().unusable().get(0);
        assertEquals(BundleException.Problem.NOT_GGUF, one.problem());
        assertEquals("onnx", one.detail());
        assertEquals(0, new ModelStore(own, null).list().models().size());
    }
}
