package org.cdcda.app;

import java.io.File;
import java.io.IOException;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.Executor;
import org.cdcda.app.device.Cpu;
import org.cdcda.app.device.Device;
import org.cdcda.app.device.Memory;
import org.cdcda.app.engine.Engine;
import org.cdcda.app.engine.EngineState;
import org.cdcda.app.model.Bundle;
import org.cdcda.app.model.BundleException;
import org.cdcda.app.model.Model;
import org.cdcda.app.model.ModelStore;
import org.cdcda.app.model.StoreException;

/**
 * From "the app was opened" to "the model answers": finds or copies a model, looks whether it goes into the memory, hands it to the engine,
 * and says at every moment how far it is. Nothing here knows of Android.
 */
public final class Session {

    /** Is told of every change, on the main thread. */
    public interface Listener {
        void changed(Status status);
    }

    private final ModelStore store;
    private final ModelStore.Source packaged;
    private final Engine engine;
    private final Device device;
    private final Settings settings;
    private final Executor background;
    private final Executor main;
    private final List<Listener> watching = new CopyOnWriteArrayList<>();

    // Guarded by this.
    private Status status = Status.of(Status.Stage.LOOKING);
    /** Counts what was asked for: what an older wish found out is not told any more. */
    private int wish;
    private boolean isOpen;
    /** What was there when a model was last chosen. */
    private ModelStore.Found seen;
    /** Picked files that are not copied yet: a copy that was interrupted, or had no room, goes on when the app begins anew. */
    private ModelStore.Source picked;
    private String pickedName;

    /**
     * @param store the models on this phone
     * @param packaged the model that the package brings, or null
     * @param engine what answers
     * @param device the phone
     * @param settings what the user chose
     * @param background where files are read; one task at a time
     * @param main where listeners are told
     */
    public Session(
            ModelStore store, ModelStore.Source packaged, Engine engine, Device device, Settings settings, Executor background, Executor main) {
        this.store = store;
        this.packaged = packaged;
        this.engine = engine;
        this.device = device;
        this.settings = settings;
        this.background = background;
        this.main = main;
        engine.watch(this::engineChanged);
    }

    public Engine engine() {
        return engine;
    }

    public ModelStore store() {
        return store;
    }

    public Device device() {
        return device;
    }

    public Settings settings() {
        return settings;
    }

    public synchronized Status status() {
        return status;
    }

    /** Watches, and is told at once how it stands. */
    public void watch(Listener listener) {
        watching.add(listener);
        listener.changed(status());
    }

    public void unwatch(Listener listener) {
        watching.remove(listener);
    }

    /** The app is to be seen: the model is loaded if it is not. Where there was none, somebody may have sent one by now. */
    public synchronized void open() {
        if (!isOpen || status.isWaiting()) {
            isOpen = true;
            begin();
        }
    }

    /** Where there was no model: begins anew if something else is there than before, such as a model that was pushed. */
    public synchronized void lookAgain() {
        if (isOpen && status.isWaiting()) {
            background.execute(() -> {
                ModelStore.Found found = store.list();
                synchronized (this) {
                    if (isOpen && status.isWaiting() && !found.equals(seen)) {
                        begin();
                    }
                }
            });
        }
    }

    /** The app is out of sight for good: the engine and its memory go. */
    public synchronized void close() {
        isOpen = false;
        ++wish;
        engine.unload();
        become(Status.of(Status.Stage.LOOKING));
    }

    /** Begins anew: after a failure, with another model, or with other settings. */
    public synchronized void restart() {
        isOpen = true;
        begin();
    }

    /** Uses another model, and no picked files that are not copied yet. */
    public synchronized void use(Model model) {
        picked = null;
        settings.setModel(model.key());
        restart();
    }

    /** Copies files that the user picked, and uses them. */
    public synchronized void add(ModelStore.Source source, String name) {
        isOpen = true;
        picked = source;
        pickedName = name;
        begin();
    }

    /** Removes a model, or what is none; if it was the one in use, or what stood in the way, the app looks again. */
    public void delete(File folder) {
        background.execute(() -> {
            store.delete(folder);
            synchronized (this) {
                if (picked != null && folder.equals(store.folder(pickedName))) {
                    picked = null; // what was copied of it so far is not wanted
                }
                boolean isInQuestion = status.model() == null ? !status.isBusy() : status.model().folder().equals(folder);
                if (isOpen && isInQuestion) {
                    begin();
                } else {
                    become(status); // a list of models is out of date
                }
            }
        });
    }

    /** Returns how many threads compute, and on which cores. */
    public List<Integer> cores() {
        List<Integer> big = Cpu.bigCores(device.cores());
        int wanted = settings.threads();
        return wanted == 0 || wanted >= big.size() ? big : big.subList(0, wanted);
    }

    /** Returns the context that a model is loaded with, in tokens. */
    public int contextOf(Model model) {
        int most = model.bundle().contextLength();
        return settings.context() == 0 ? most : Math.min(most, settings.context());
    }

    /** Says whether a model goes into the memory. */
    public Memory.Verdict verdict(Model model) {
        return Memory.verdict(model.bundle().memoryFor(contextOf(model)), device.memory());
    }

    private void begin() {
        int mine = ++wish;
        engine.unload();
        become(Status.of(Status.Stage.LOOKING));
        ModelStore.Source mineToCopy = picked;
        String name = pickedName;
        background.execute(() -> {
            if (mineToCopy != null) {
                Status failed = install(mineToCopy, name, mine);
                if (!isWished(mine)) {
                    return; // it goes on with the next wish
                }
                if (failed == null || !failed.isWorthAnotherTry()) {
                    forgetPicked(mineToCopy);
                }
                if (failed != null) {
                    become(failed, mine);
                    return;
                }
                settings.setModel(Model.Origin.IMPORTED + "/" + name);
            }
            choose(mine, unpack(mine));
        });
    }

    private synchronized void forgetPicked(ModelStore.Source source) {
        if (picked == source) {
            picked = null;
        }
    }

    /** Copies the package's model if it is a new one; returns what went wrong, or null. */
    private Status unpack(int mine) {
        try {
            boolean isThere = packaged == null || !store.isNew(packaged, ModelStore.BUNDLED);
            return isThere ? null : install(packaged, ModelStore.BUNDLED, mine);
        } catch (IOException error) {
            return Status.notCopied(null, String.valueOf(error.getMessage()), 0);
        }
    }

    /** Copies what goes into the memory; returns what went wrong, or null. */
    private Status install(ModelStore.Source source, String name, int mine) {
        long[] told = {-1};
        try {
            Model model = store.read(source, name);
            if (verdict(model) == Memory.Verdict.DOES_NOT_FIT) {
                return Status.of(Status.Stage.TOO_LARGE, model);
            }
            store.install(
                    source,
                    name,
                    (done, of) -> {
                        long percent = of == 0 ? 100 : 100 * done / of;
                        if (percent != told[0]) {
                            told[0] = percent;
                            become(Status.copying(done, of), mine);
                        }
                    },
                    () -> !isWished(mine));
            return null;
        } catch (BundleException error) {
            return Status.unusable(error.problem(), error.getMessage());
        } catch (StoreException error) {
            return Status.notCopied(error.problem(), error.getMessage(), error.bytes());
        } catch (IOException error) {
            return Status.notCopied(null, String.valueOf(error.getMessage()), 0);
        }
    }

    /** Takes the chosen model, else the first one; what the package brings and cannot be copied is no reason against another one. */
    private void choose(int mine, Status failed) {
        ModelStore.Found found = store.list();
        synchronized (this) {
            seen = found;
        }
        Model model = null;
        for (Model one : found.models()) {
            boolean isChosen = one.key().equals(settings.model());
            if (isChosen || model == null && failed == null) {
                model = one;
            }
        }
        if (model == null && failed != null) {
            become(failed, mine);
            return;
        }
        if (model == null) {
            become(
                    found.unusable().isEmpty()
                            ? Status.of(Status.Stage.NO_MODEL)
                            : Status.unusable(found.unusable().get(0).problem(), found.unusable().get(0).detail()),
                    mine);
            return;
        }
        become(Status.of(Status.Stage.CHECKING, model), mine);
        if (verdict(model) == Memory.Verdict.DOES_NOT_FIT) {
            become(Status.of(Status.Stage.TOO_LARGE, model), mine);
            return;
        }
        try {
            if (!store.isIntact(model, () -> !isWished(mine))) {
                become(Status.of(Status.Stage.DAMAGED, model), mine);
                return;
            }
        } catch (IOException error) {
            become(Status.of(Status.Stage.DAMAGED, model), mine);
            return;
        }
        hand(model, mine);
    }

    private synchronized void hand(Model model, int mine) {
        if (mine == wish) {
            List<Integer> cores = cores();
            become(Status.engine(model, EngineState.of(EngineState.Phase.LOADING)));
            engine.load(model.start(contextOf(model), Math.max(1, cores.size()), Cpu.mask(cores)));
        }
    }

    private synchronized void engineChanged(EngineState told) {
        EngineState state = engine.state(); // what was told may be about an engine that is gone
        if (status.stage() == Status.Stage.ENGINE && state.phase() != EngineState.Phase.ABSENT) {
            become(Status.engine(status.model(), state));
        }
    }

    private synchronized boolean isWished(int mine) {
        return mine == wish;
    }

    private synchronized void become(Status next, int mine) {
        if (mine == wish) {
            become(next);
        }
    }

    private void become(Status next) {
        status = next;
        main.execute(() -> {
            for (Listener listener : watching) {
                listener.changed(next);
            }
        });
    }
}
