package org.cdcda.app.ui;

import java.io.File;
import org.cdcda.app.Fakes.FakeDevice;
import org.cdcda.app.Fakes.FakeEngine;
import org.cdcda.app.Fakes.FakePackage;
import org.cdcda.app.Fakes.FakeSettings;
import org.cdcda.app.Session;
import org.cdcda.app.model.ModelStore;

/** The app with a fake engine on a fake phone. */
public final class TestApp extends App {
    final FakeEngine engine = new FakeEngine();
    final FakeDevice device = new FakeDevice();
    FakePackage packaged = new FakePackage(true);
    private int times;

    /** The next session begins with an empty phone. */
    void forget() {
        times++;
        forgetSession();
    }

    private File files() {
        return new File(getNoBackupFilesDir(), String.valueOf(times));
    }

    /** Returns where pushed models lie. */
    File pushed() {
        return new File(files(), "pushed");
    }

    @Override
    protected Session create() {
        var store = new ModelStore(new File(files(), "models"), pushed());
        return new Session(store, packaged, engine, device, new FakeSettings(), Runnable::run, Runnable::run);
    }
}
