package org.cdcda.app.model;

import java.io.File;
import org.cdcda.app.engine.Start;

/**
 * A model that can be loaded.
 *
 * @param name of its folder
 * @param origin where it came from
 * @param folder its files
 * @param bundle what is known of it
 */
public record Model(String name, Origin origin, File folder, Bundle bundle) {

    /** Where a model came from. */
    public enum Origin {
        /** It was in the app's package. */
        BUNDLED,
        /** {@code cdcda push} put it into the app's folder of the shared storage. */
        PUSHED,
        /** The user picked its files. */
        IMPORTED
    }

    /** Returns what tells it from all others: own and pushed models may have the same name. */
    public String key() {
        return origin + "/" + name;
    }

    /** Returns a file of the bundle, or null where it has none in this role. */
    public File file(String role) {
        Bundle.Part part = bundle.files().get(role);
        return part == null ? null : new File(folder, part.name());
    }

    /** Returns how the engine is to load it. */
    public Start start(int context, int threads, long cores) {
        return new Start(file(Bundle.MODEL), file(Bundle.ADAPTER), context, threads, cores);
    }

    /** Whether every file is there in its full length. */
    public boolean isWhole() {
        for (Bundle.Part part : bundle.files().values()) {
            if (new File(folder, part.name()).length() != part.bytes()) {
                return false;
            }
        }
        return true;
    }
}
