package org.cdcda.app.ui;

import android.content.res.AssetManager;
import java.io.IOException;
import java.io.InputStream;
import org.cdcda.app.model.Bundle;
import org.cdcda.app.model.ModelStore;

/** The model that the package brings, in assets/model. */
final class PackagedModel implements ModelStore.Source {
    private static final String FOLDER = "model/";

    private final AssetManager assets;

    private PackagedModel(AssetManager assets) {
        this.assets = assets;
    }

    /** Returns it, or null where the package was made without one. */
    static PackagedModel of(AssetManager assets) {
        try {
            assets.open(FOLDER + Bundle.FILE).close();
            return new PackagedModel(assets);
        } catch (IOException error) {
            return null;
        }
    }

    @Override
    public InputStream open(String name, long skipped) throws IOException {
        InputStream in = assets.open(FOLDER + name, AssetManager.ACCESS_STREAMING);
        for (long left = skipped; left > 0; ) {
            long went = in.skip(left);
            if (went <= 0) {
                in.close();
                throw new IOException(name + " is shorter than it was");
            }
            left -= went;
        }
        return in;
    }
}
