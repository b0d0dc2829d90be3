package org.cdcda.app;

import org.cdcda.app.engine.EngineState;
import org.cdcda.app.model.BundleException;
import org.cdcda.app.model.Model;
import org.cdcda.app.model.StoreException;

/**
 * How far the app is with its model.
 *
 * @param stage what goes on
 * @param model the chosen one, or null
 * @param done bytes that were copied, for COPYING
 * @param of bytes to copy
 * @param engine where the engine is, for ENGINE
 * @param refusal why a bundle cannot be used, or null
 * @param trouble why a copy failed, or null
 * @param detail a number or a name that belongs to the reason
 */
public record Status(
        Stage stage,
        Model model,
        long done,
        long of,
        EngineState engine,
        BundleException.Problem refusal,
        StoreException.Problem trouble,
        String detail) {

    /** What goes on. */
    public enum Stage {
        /** Nothing yet: the app was opened, or came back. */
        LOOKING,
        /** The package's model, or picked files, are copied. */
        COPYING,
        /** The hashes of a pushed model are compared. */
        CHECKING,
        /** There is no model. */
        NO_MODEL,
        /** The bundle is none for this app. */
        UNUSABLE,
        /** The copy failed. */
        NOT_COPIED,
        /** The files are not what the bundle names. */
        DAMAGED,
        /** It does not go into the memory that an app may take. */
        TOO_LARGE,
        /** The model was handed to the engine. */
        ENGINE
    }

    static Status of(Stage stage) {
        return new Status(stage, null, 0, 0, EngineState.ABSENT, null, null, "");
    }

    static Status of(Stage stage, Model model) {
        return new Status(stage, model, 0, 0, EngineState.ABSENT, null, null, "");
    }

    static Status copying(long done, long of) {
        return new Status(Stage.COPYING, null, done, of, EngineState.ABSENT, null, null, "");
    }

    static Status unusable(BundleException.Problem problem, String detail) {
        return new Status(Stage.UNUSABLE, null, 0, 0, EngineState.ABSENT, problem, null, detail);
    }

    static Status notCopied(StoreException.Problem problem, String detail, long bytes) {
        return new Status(Stage.NOT_COPIED, null, 0, bytes, EngineState.ABSENT, null, problem, detail);
    }

    static Status engine(Model model, EngineState state) {
        return new Status(Stage.ENGINE, model, 0, 0, state, null, null, "");
    }

    /** Whether the model can be asked. */
    public boolean isReady() {
        return stage == Stage.ENGINE && engine.isReady();
    }

    /** Whether it answers at the moment. */
    public boolean isGenerating() {
        return stage == Stage.ENGINE && engine.phase() == EngineState.Phase.GENERATING;
    }

    /** Whether files are missing that may come from elsewhere at any time. */
    public boolean isWaiting() {
        return stage == Stage.NO_MODEL || stage == Stage.UNUSABLE || stage == Stage.DAMAGED;
    }

    /** Whether the same files can be used after all: with more room, or with less context. */
    public boolean isWorthAnotherTry() {
        return stage == Stage.TOO_LARGE
                || stage == Stage.NOT_COPIED && trouble != StoreException.Problem.FILE_MISSING && trouble != StoreException.Problem.DAMAGED;
    }

    /** Whether something is on its way, so that waiting helps. */
    public boolean isBusy() {
        return stage == Stage.LOOKING
                || stage == Stage.COPYING
                || stage == Stage.CHECKING
                || stage == Stage.ENGINE && engine.phase() == EngineState.Phase.LOADING;
    }
}
