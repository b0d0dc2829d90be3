package org.cdcda.app.ui;

import android.content.Context;
import android.content.res.Resources;
import android.text.format.Formatter;
import java.util.Locale;
import org.cdcda.app.R;
import org.cdcda.app.Session;
import org.cdcda.app.Status;
import org.cdcda.app.device.Memory;
import org.cdcda.app.engine.Answer;
import org.cdcda.app.model.BundleException;
import org.cdcda.app.model.Model;
import org.cdcda.app.model.StoreException;

/** What is said about everything that can happen, one sentence each, and what the user can do about it. */
final class Words {

    /** What helps. */
    enum Remedy {
        NONE,
        TRY_AGAIN,
        MODELS,
        SETTINGS
    }

    private final Context context;
    private final Resources resources;

    Words(Context context) {
        this.context = context;
        this.resources = context.getResources();
    }

    /** Returns what is said about a status, "" where nothing has to be. */
    String of(Status status, Session session) {
        return switch (status.stage()) {
            case LOOKING -> text(R.string.stage_looking);
            case COPYING -> text(R.string.stage_copying, size(status.done()), size(status.of()));
            case CHECKING -> text(R.string.stage_checking);
            case NO_MODEL -> text(R.string.stage_no_model);
            case UNUSABLE -> of(status.refusal(), status.detail());
            case NOT_COPIED -> of(status.trouble(), status.detail(), status.of());
            case DAMAGED -> text(R.string.stage_damaged);
            case TOO_LARGE -> tooLarge(status.model(), session);
            case ENGINE -> ofEngine(status);
        };
    }

    /** Returns what helps. */
    static Remedy remedy(Status status) {
        return switch (status.stage()) {
            case LOOKING, COPYING, CHECKING -> Remedy.NONE;
            case NO_MODEL, UNUSABLE, DAMAGED -> Remedy.MODELS;
            case NOT_COPIED -> status.isWorthAnotherTry() ? Remedy.TRY_AGAIN : Remedy.MODELS;
            case TOO_LARGE -> Remedy.SETTINGS;
            case ENGINE -> switch (status.engine().failure()) {
                case NONE, UNSUPPORTED_CPU -> Remedy.NONE;
                case NOT_ENOUGH_MEMORY, DID_NOT_START, TOO_SLOW, DIED -> Remedy.TRY_AGAIN;
            };
        };
    }

    /** Returns what is wrong with a bundle. */
    String of(BundleException.Problem problem, String detail) {
        return switch (problem) {
            case UNREADABLE -> text(R.string.stage_unreadable);
            case OTHER_VERSION -> text(R.string.stage_other_version);
            case INCOMPLETE -> text(R.string.stage_incomplete);
            case NOT_GGUF -> text(R.string.stage_not_gguf, detail);
            case NOT_VERIFIED -> text(R.string.stage_not_verified);
        };
    }

    private String of(StoreException.Problem problem, String detail, long bytes) {
        if (problem == null) {
            return text(R.string.stage_copy_failed, detail);
        }
        return switch (problem) {
            case NO_SPACE -> text(R.string.stage_no_space, size(bytes));
            case DAMAGED -> text(R.string.stage_copy_damaged, detail);
            case FILE_MISSING -> text(R.string.stage_file_missing, detail);
            case STOPPED -> text(R.string.stage_copy_stopped);
        };
    }

    private String tooLarge(Model model, Session session) {
        long needed = model.bundle().memoryFor(session.contextOf(model));
        return text(R.string.stage_too_large, size(needed), size(Memory.budget(session.device().memory())));
    }

    private String ofEngine(Status status) {
        String detail = status.engine().detail();
        return switch (status.engine().phase()) {
            case ABSENT, LOADING -> text(R.string.engine_loading);
            case READY, GENERATING -> "";
            case FAILED -> switch (status.engine().failure()) {
                case NONE -> "";
                case UNSUPPORTED_CPU -> text(R.string.engine_unsupported_cpu);
                case NOT_ENOUGH_MEMORY -> text(R.string.engine_not_enough_memory);
                case DID_NOT_START -> text(R.string.engine_did_not_start, detail);
                case TOO_SLOW -> text(R.string.engine_too_slow);
                case DIED -> text(R.string.engine_died, detail);
            };
        };
    }

    /** Returns what is said about the end of an answer. */
    String of(Answer answer) {
        String why = switch (answer.end()) {
            case COMPLETE -> "";
            case CUT -> text(R.string.end_cut);
            case STOPPED -> text(R.string.end_stopped);
            case TOO_LONG -> text(R.string.end_too_long);
            case FAILED -> text(R.string.end_failed, answer.detail());
        };
        Answer.Timings timings = answer.timings();
        String speed = timings.answerTokens() == 0 ? "" : text(R.string.speed, timings.answerTokens(), number(timings.decode()));
        return (why + " " + speed).trim();
    }

    /** Returns how a model goes into the memory. */
    String of(Memory.Verdict verdict) {
        return text(switch (verdict) {
            case FITS -> R.string.memory_fits;
            case TIGHT -> R.string.memory_tight;
            case DOES_NOT_FIT -> R.string.memory_does_not_fit;
        });
    }

    /** Returns where a model came from. */
    String of(Model.Origin origin) {
        return text(switch (origin) {
            case BUNDLED -> R.string.origin_bundled;
            case PUSHED -> R.string.origin_pushed;
            case IMPORTED -> R.string.origin_imported;
        });
    }

    String text(int id, Object... values) {
        return resources.getString(id, values);
    }

    String size(long bytes) {
        return Formatter.formatShortFileSize(context, bytes);
    }

    String number(double value) {
        return String.format(locale(), value < 10 ? "%.1f" : "%.0f", value);
    }

    String percent(double share) {
        return String.format(locale(), "%.0f %%", 100 * share);
    }

    private Locale locale() {
        return resources.getConfiguration().getLocales().get(0);
    }
}
