package org.cdcda.app.ui;

import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import org.cdcda.app.R;
import org.cdcda.app.Status;
import org.cdcda.app.model.Bundle;
import org.cdcda.app.model.Model;
import org.cdcda.app.model.ModelStore;

/** What is known of the model: what it learned from, what quantization cost, which file it is, whose licences. */
public final class AboutActivity extends Page {

    @Override
    public void changed(Status status) {
        content.removeAllViews();
        addNote(words.text(R.string.about_promise));
        Model model = status.model();
        if (model == null) {
            addNote(words.text(R.string.about_none));
            return;
        }
        Bundle bundle = model.bundle();
        if (bundle.records() != Bundle.UNKNOWN) {
            addFact(R.string.about_learned, words.text(R.string.about_learned_value, bundle.records(), bundle.synthetic()));
        }
        List<String> tasks = new ArrayList<>();
        for (Bundle.Preset preset : bundle.presets()) {
            tasks.add(preset.task().replace('_', ' '));
        }
        if (!tasks.isEmpty()) {
            addFact(R.string.about_tasks, String.join(", ", tasks));
        }
        addFact(R.string.about_base, bundle.baseName() + " (" + bundle.baseLicence() + ")");
        addFact(R.string.about_size, words.size(bundle.bytes()));
        addFact(R.string.about_quant, bundle.quant());
        addFact(R.string.about_memory, words.size(bundle.memoryFor(session.contextOf(model))) + ". " + words.of(session.verdict(model)));
        Bundle.Checks checks = bundle.checks();
        addFact(
                R.string.about_checks,
                words.text(
                        R.string.about_checks_value,
                        nats(checks.kl()),
                        nats(checks.klGate()),
                        words.percent(checks.top1()),
                        words.percent(checks.top1Gate())));
        List<String> hashes = new ArrayList<>();
        for (Bundle.Part part : bundle.files().values()) {
            hashes.add(part.name() + "\n" + part.sha256());
        }
        addFact(R.string.about_hash, String.join("\n\n", hashes));
        addFact(R.string.about_licences, licences(model) + "\n" + engineLicences());
    }

    private static String nats(double value) {
        return String.format(Locale.ROOT, "%.4f", value);
    }

    private static String licences(Model model) {
        try {
            return new String(Files.readAllBytes(new File(model.folder(), model.bundle().licences()).toPath()), StandardCharsets.UTF_8);
        } catch (IOException error) {
            return "";
        }
    }

    /** Returns the licences of what the engine is made of, which the package brings. */
    private String engineLicences() {
        var all = new StringBuilder();
        try {
            for (String name : getAssets().list("licences")) {
                try (InputStream in = getAssets().open("licences/" + name)) {
                    all.append(name.replace(".txt", "")).append("\n\n").append(ModelStore.text(in)).append("\n\n");
                }
            }
        } catch (IOException error) {
            return all.toString();
        }
        return all.toString();
    }
}
