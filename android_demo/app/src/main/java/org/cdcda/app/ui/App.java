package org.cdcda.app.ui;

import android.app.Activity;
import android.app.Application;
import android.content.Context;
import android.os.Bundle;
import android.os.Handler;
import android.os.Looper;
import java.io.File;
import java.util.List;
import java.util.concurrent.Executor;
import java.util.concurrent.Executors;
import org.cdcda.app.Benchmark;
import org.cdcda.app.Session;
import org.cdcda.app.Writing;
import org.cdcda.app.device.Cpu;
import org.cdcda.app.device.Device;
import org.cdcda.app.engine.Engine;
import org.cdcda.app.engine.LlamaEngine;
import org.cdcda.app.model.ModelStore;

/** The process: one session for all screens, which ends when the app is out of sight for a while, or sooner where memory is short. */
public class App extends Application {
    private static final long PATIENCE_MILLIS = 180_000;
    /** A look at another app does not cost the model; a phone in the pocket does. */
    private static final long OUT_OF_SIGHT_MILLIS = 30_000;
    /** How soon a pushed model is noticed where there was none. */
    private static final long LOOK_MILLIS = 3_000;

    private final Handler handler = new Handler(Looper.getMainLooper());
    private final Runnable close = () -> session().close();
    private final Runnable look = this::look;
    private Session session;
    private Writing writing;
    private Benchmark benchmark;
    private int visible;

    /** Returns the session of a screen's app. */
    static Session sessionOf(Context context) {
        return ((App) context.getApplicationContext()).session();
    }

    @Override
    public void onCreate() {
        super.onCreate();
        registerActivityLifecycleCallbacks(new Sight());
    }

    /** Returns the session, made at the first call. */
    synchronized Session session() {
        if (session == null) {
            session = create();
        }
        return session;
    }

    /** Returns the answer that is being written. */
    synchronized Writing writing() {
        if (writing == null) {
            writing = new Writing(session().engine());
        }
        return writing;
    }

    /** Returns the benchmark. */
    synchronized Benchmark benchmark() {
        if (benchmark == null) {
            benchmark = new Benchmark(session());
        }
        return benchmark;
    }

    /** Lets the next screen make everything anew; for tests, in which one process is many. */
    synchronized void forgetSession() {
        session = null;
        writing = null;
        benchmark = null;
    }

    /** Makes the session; tests make their own. */
    protected Session create() {
        Executor main = handler::post;
        Device device = new AndroidDevice(this);
        File pushed = getExternalFilesDir("models");
        var store = new ModelStore(new File(getNoBackupFilesDir(), "models"), pushed);
        Executor background = Executors.newSingleThreadExecutor();
        return new Session(store, PackagedModel.of(getAssets()), engine(device, main), device, new Preferences(this), background, main);
    }

    private Engine engine(Device device, Executor main) {
        String variant = Cpu.variant(device.abi(), device.cpuinfo());
        var program = new File(getApplicationInfo().nativeLibraryDir, "libllama-server-" + variant + ".so");
        List<String> command = program.isFile() ? List.of(program.getPath()) : List.of();
        return new LlamaEngine(command, getNoBackupFilesDir(), new LocalSocketTransport(), main, PATIENCE_MILLIS);
    }

    @Override
    public void onTrimMemory(int level) {
        super.onTrimMemory(level);
        // Newer Androids say no more than that the app went to the back of the queue; soon afterwards it may be frozen with its memory. In sight
        // the model stays: Android closes other apps for it, and without it this one is of no use.
        if (level >= TRIM_MEMORY_BACKGROUND && session != null && visible == 0) {
            session.close();
        }
    }

    private void look() {
        session().lookAgain();
        handler.postDelayed(look, LOOK_MILLIS);
    }

    /** Counts the screens that can be seen. */
    private final class Sight implements ActivityLifecycleCallbacks {
        @Override
        public void onActivityStarted(Activity activity) {
            handler.removeCallbacks(close);
            visible++;
            session().open();
            handler.removeCallbacks(look);
            handler.postDelayed(look, LOOK_MILLIS);
        }

        @Override
        public void onActivityStopped(Activity activity) {
            visible--;
            if (visible == 0) {
                handler.removeCallbacks(look);
                handler.postDelayed(close, OUT_OF_SIGHT_MILLIS);
            }
        }

        @Override
        public void onActivityCreated(Activity activity, Bundle state) {}

        @Override
        public void onActivityResumed(Activity activity) {}

        @Override
        public void onActivityPaused(Activity activity) {}

        @Override
        public void onActivitySaveInstanceState(Activity activity, Bundle state) {}

        @Override
        public void onActivityDestroyed(Activity activity) {}
    }
}
