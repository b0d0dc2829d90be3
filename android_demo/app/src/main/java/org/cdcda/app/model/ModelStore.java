package org.cdcda.app.model;

import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.FileOutputStream;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.List;
import java.util.function.BooleanSupplier;
import java.util.function.LongSupplier;
import org.cdcda.app.model.Model.Origin;

/**
 * The models on this phone. Those from the app's package and those that were picked are copied into private storage; pushed ones stay where
 * adb put them. A folder is a model as soon as its bundle.json is there, which is always written last.
 */
public final class ModelStore {
    /** The name of the model that the package brings. */
    public static final String BUNDLED = "bundled";
    private static final String CHECKED = ".checked";
    private static final int MOST_JSON = 1 << 20;
    /** Left free on the storage. */
    private static final long SPARE = 32L << 20;

    /** Files that come from somewhere else. */
    public interface Source {
        /** Opens a file behind so many bytes; FileNotFoundException where there is none of this name. */
        InputStream open(String name, long skipped) throws IOException;
    }

    /** Is told how far it is. */
    public interface Progress {
        void at(long bytes, long of);
    }

    /** A folder that holds something else than a usable model. */
    public record Unusable(File folder, Origin origin, BundleException.Problem problem, String detail) {}

    /** What is there. */
    public record Found(List<Model> models, List<Unusable> unusable) {}

    private final File own;
    private final File pushed;
    private final LongSupplier room;
    /** Where files are copied to at the moment, or null. */
    private volatile File growing;

    /**
     * @param own a private folder
     * @param pushed where {@code cdcda push} puts models, or null where the phone has no shared storage at the moment
     */
    public ModelStore(File own, File pushed) {
        this(own, pushed, own::getUsableSpace);
    }

    /**
     * @param own a private folder
     * @param pushed where {@code cdcda push} puts models, or null
     * @param room tells how many bytes the private folder's storage has
     */
    public ModelStore(File own, File pushed, LongSupplier room) {
        this.own = own;
        this.pushed = pushed;
        this.room = room;
    }

    /** Returns all models, those of the package first; a copy that goes on is neither a model nor a broken one. */
    public Found list() {
        var found = new Found(new ArrayList<>(), new ArrayList<>());
        look(own, found, false);
        look(pushed, found, true);
        return found;
    }

    private void look(File parent, Found found, boolean isPushed) {
        File[] folders = parent == null ? null : parent.listFiles(folder -> folder.isDirectory() && !folder.equals(growing));
        if (folders == null) {
            return;
        }
        Arrays.sort(folders, Comparator.comparing((File folder) -> !folder.getName().equals(BUNDLED)).thenComparing(File::getName));
        for (File folder : folders) {
            String name = folder.getName();
            Origin origin = isPushed ? Origin.PUSHED : name.equals(BUNDLED) ? Origin.BUNDLED : Origin.IMPORTED;
            var file = new File(folder, Bundle.FILE);
            if (!file.isFile()) { // a copy that was stopped, or a push that goes on
                found.unusable().add(new Unusable(folder, origin, BundleException.Problem.INCOMPLETE, name));
                continue;
            }
            try {
                var model = new Model(name, origin, folder, Bundle.parse(text(Files.readAllBytes(file.toPath()))));
                if (!model.isWhole()) {
                    throw new BundleException(BundleException.Problem.INCOMPLETE, name);
                }
                found.models().add(model);
            } catch (BundleException error) {
                found.unusable().add(new Unusable(folder, origin, error.problem(), error.getMessage()));
            } catch (IOException error) {
                found.unusable().add(new Unusable(folder, origin, BundleException.Problem.UNREADABLE, String.valueOf(error.getMessage())));
            }
        }
    }

    /** Whether a source brings another model than the one of this name that is there. */
    public boolean isNew(Source source, String name) throws IOException {
        var file = new File(new File(own, name), Bundle.FILE);
        return !file.isFile() || !text(Files.readAllBytes(file.toPath())).equals(json(source));
    }

    /** Returns where the files of a source are copied to. */
    public File folder(String name) {
        return new File(own, name);
    }

    /** Returns what a source becomes when it is copied. */
    public Model read(Source source, String name) throws IOException, BundleException {
        return model(name, json(source));
    }

    private Model model(String name, String json) throws BundleException {
        return new Model(name, name.equals(BUNDLED) ? Origin.BUNDLED : Origin.IMPORTED, folder(name), Bundle.parse(json));
    }

    /**
     * Copies a bundle into private storage.
     *
     * @param source where its files are
     * @param name of its folder
     * @param progress told as it goes on
     * @param stopped asked now and then
     */
    public Model install(Source source, String name, Progress progress, BooleanSupplier stopped) throws IOException, BundleException {
        String json = json(source);
        Model model = model(name, json);
        Bundle bundle = model.bundle();
        File folder = model.folder();
        // Before anything of an earlier model is touched.
        for (Bundle.Part part : bundle.files().values()) {
            open(source, part.name(), 0).close();
        }
        open(source, bundle.licences(), 0).close();
        own.mkdirs(); // what is not there has no room
        List<File> old = old(folder, bundle);
        long missing = missing(folder, bundle, old);
        if (missing > 0) {
            throw new StoreException(StoreException.Problem.NO_SPACE, name, missing);
        }
        if (!folder.isDirectory() && !folder.mkdirs()) {
            throw new IOException("cannot create " + folder);
        }
        growing = folder;
        try {
            var marker = new File(folder, Bundle.FILE);
            marker.delete(); // first: what is left is no model
            old.forEach(File::delete);
            long[] done = {0};
            for (Bundle.Part part : bundle.files().values()) {
                Copy.copy(skipped -> open(source, part.name(), skipped), part, new File(folder, part.name()), count -> {
                    done[0] += count;
                    progress.at(done[0], bundle.bytes());
                }, stopped);
            }
            write(new File(folder, bundle.licences()), read(open(source, bundle.licences(), 0)));
            write(marker, json.getBytes(StandardCharsets.UTF_8));
        } finally {
            growing = null;
        }
        return model;
    }

    /** Returns what belongs to another model of this name. */
    private static List<File> old(File folder, Bundle bundle) {
        List<File> old = new ArrayList<>(List.of(files(folder)));
        for (Bundle.Part part : bundle.files().values()) {
            var target = new File(folder, part.name());
            old.removeIf(file -> file.equals(target) && file.length() == part.bytes() || file.equals(Copy.partial(target, part)));
        }
        return old;
    }

    /** Returns how many bytes the storage lacks for all files of a bundle, when the old ones are gone. */
    private long missing(File folder, Bundle bundle, List<File> old) {
        long missing = SPARE - room.getAsLong();
        for (Bundle.Part part : bundle.files().values()) {
            var target = new File(folder, part.name());
            missing += target.length() == part.bytes() ? 0 : part.bytes() - Math.min(Copy.partial(target, part).length(), part.bytes());
        }
        for (File file : old) {
            missing -= file.length();
        }
        return missing;
    }

    private static File[] files(File folder) {
        File[] files = folder.listFiles();
        return files == null ? new File[0] : files;
    }

    /** Compares the files of a pushed model with their hashes; once, as long as they do not change. Copied ones were compared as they came. */
    public boolean isIntact(Model model, BooleanSupplier stopped) throws IOException {
        if (model.origin() != Origin.PUSHED) {
            return true;
        }
        var seen = new StringBuilder();
        for (Bundle.Part part : model.bundle().files().values()) {
            var file = new File(model.folder(), part.name());
            seen.append(part.sha256()).append(' ').append(file.lastModified()).append('\n');
        }
        var note = new File(own, model.name() + CHECKED);
        if (note.isFile() && text(Files.readAllBytes(note.toPath())).contentEquals(seen)) {
            return true;
        }
        for (Bundle.Part part : model.bundle().files().values()) {
            if (!Copy.hash(new File(model.folder(), part.name()), stopped).equals(part.sha256())) {
                return false;
            }
        }
        own.mkdirs();
        write(note, seen.toString().getBytes(StandardCharsets.UTF_8));
        return true;
    }

    /** Removes the folder of a model, or of what is none. */
    public void delete(File folder) {
        new File(folder, Bundle.FILE).delete(); // first: what is left is no model
        for (File file : files(folder)) {
            file.delete();
        }
        folder.delete();
        new File(own, folder.getName() + CHECKED).delete();
    }

    private static InputStream open(Source source, String name, long skipped) throws IOException {
        try {
            return source.open(name, skipped);
        } catch (FileNotFoundException error) {
            throw new StoreException(StoreException.Problem.FILE_MISSING, name, 0);
        }
    }

    private static String json(Source source) throws IOException {
        return text(open(source, Bundle.FILE, 0));
    }

    /** Returns a text file's content, of a megabyte at most. */
    public static String text(InputStream opened) throws IOException {
        return text(read(opened));
    }

    private static byte[] read(InputStream opened) throws IOException {
        try (InputStream in = opened) {
            var all = new ByteArrayOutputStream();
            byte[] buffer = new byte[8192];
            for (int count; all.size() < MOST_JSON && (count = in.read(buffer)) >= 0; ) {
                all.write(buffer, 0, count);
            }
            return all.toByteArray();
        }
    }

    /** Writes a file that has its name only when it is whole. */
    private static void write(File file, byte[] content) throws IOException {
        var partial = new File(file.getPath() + ".new");
        try (var out = new FileOutputStream(partial)) {
            out.write(content);
            out.getFD().sync();
        }
        if (!partial.renameTo(file)) {
            throw new IOException("cannot rename " + partial);
        }
    }

    private static String text(byte[] content) {
        return new String(content, StandardCharsets.UTF_8);
    }
}
