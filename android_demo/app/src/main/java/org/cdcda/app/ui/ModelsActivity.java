package org.cdcda.app.ui;

import android.app.AlertDialog;
import android.content.Intent;
import android.view.View;
import android.widget.Button;
import java.io.File;
import org.cdcda.app.R;
import org.cdcda.app.Status;
import org.cdcda.app.model.Model;
import org.cdcda.app.model.Model.Origin;
import org.cdcda.app.model.ModelStore;

/** The models on this phone: which is used, which could be, and how others get here. */
public final class ModelsActivity extends Page {
    private static final int PICK = 1;
    /** Where picked files go; the next pick takes their place. */
    private static final String PICKED = "picked";

    private boolean isCopying;
    private AlertDialog question;

    @Override
    public void changed(Status status) {
        boolean wasCopying = isCopying;
        isCopying = status.stage() == Status.Stage.COPYING;
        content.setKeepScreenOn(isCopying); // a dark phone would end the copy
        if (isCopying && wasCopying) { // the list is what it was
            Page.set(content, R.id.value, words.of(status, session));
            return;
        }
        content.removeAllViews();
        addNote(words.of(status, session));
        ModelStore.Found found = session.store().list();
        for (Model model : found.models()) {
            addModel(model, status.model());
        }
        for (ModelStore.Unusable one : found.unusable()) {
            View row = add(R.layout.model);
            describe(row, one.folder().getName(), words.of(one.origin()), words.of(one.problem(), one.detail()), "");
            row.findViewById(R.id.use).setVisibility(View.GONE);
            row.findViewById(R.id.delete).setOnClickListener(view -> ask(one.folder().getName(), one.folder()));
        }
        addMainButton(view -> pick()).setText(R.string.pick_files);
        addNote(words.text(R.string.pick_help));
    }

    private void addModel(Model model, Model used) {
        View row = add(R.layout.model);
        String needs = words.size(model.bundle().memoryFor(session.contextOf(model)));
        String facts = words.text(R.string.model_facts, model.bundle().quant(), words.size(model.bundle().bytes()), needs);
        String name = model.origin() == Origin.PUSHED ? model.name() : model.bundle().baseName();
        describe(row, name, words.of(model.origin()), facts, words.of(session.verdict(model)));
        boolean isUsed = used != null && used.folder().equals(model.folder());
        Button use = row.findViewById(R.id.use);
        use.setText(isUsed ? R.string.in_use : R.string.use);
        use.setEnabled(!isUsed);
        use.setOnClickListener(view -> session.use(model));
        View delete = row.findViewById(R.id.delete);
        delete.setVisibility(model.origin() == Origin.BUNDLED ? View.GONE : View.VISIBLE); // it would only be unpacked again
        delete.setOnClickListener(view -> ask(name, model.folder()));
    }

    private static void describe(View row, String name, String origin, String facts, String memory) {
        Page.set(row, R.id.name, name);
        Page.set(row, R.id.origin, origin);
        Page.set(row, R.id.facts, facts);
        Page.set(row, R.id.memory, memory);
    }

    private void ask(String name, File folder) {
        question = new AlertDialog.Builder(this)
                .setMessage(words.text(R.string.delete_question, name))
                .setPositiveButton(R.string.delete, (dialog, which) -> session.delete(folder))
                .setNegativeButton(R.string.keep, null)
                .show();
    }

    @Override
    protected void onDestroy() {
        if (question != null) {
            question.dismiss(); // it would hold on to a screen that was turned
        }
        super.onDestroy();
    }

    private void pick() {
        Intent open = new Intent(Intent.ACTION_OPEN_DOCUMENT)
                .addCategory(Intent.CATEGORY_OPENABLE)
                .setType("*/*")
                .putExtra(Intent.EXTRA_ALLOW_MULTIPLE, true);
        startForResult(open, PICK);
    }

    @Override
    protected void onActivityResult(int request, int result, Intent picked) {
        super.onActivityResult(request, result, picked);
        if (request == PICK && result == RESULT_OK && picked != null) {
            session.add(new PickedFiles(this, picked), PICKED);
        }
    }
}
