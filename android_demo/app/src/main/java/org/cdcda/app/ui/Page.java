package org.cdcda.app.ui;

import android.app.Activity;
import android.content.ActivityNotFoundException;
import android.content.Intent;
import android.os.Bundle;
import android.view.Gravity;
import android.view.MenuItem;
import android.view.View;
import android.view.ViewGroup;
import android.widget.Button;
import android.widget.LinearLayout;
import android.widget.TextView;
import android.widget.Toast;
import org.cdcda.app.R;
import org.cdcda.app.Session;
import org.cdcda.app.Status;

/** A screen behind the writing one: a column of rows that is told of every change of the session. */
abstract class Page extends Activity implements Session.Listener {
    protected Session session;
    protected Words words;
    protected ViewGroup content;

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        session = App.sessionOf(this);
        words = new Words(this);
        setContentView(R.layout.page);
        content = findViewById(R.id.content);
        if (getActionBar() != null) {
            getActionBar().setDisplayHomeAsUpEnabled(true);
        }
    }

    @Override
    protected void onStart() {
        super.onStart();
        session.watch(this);
    }

    @Override
    protected void onStop() {
        session.unwatch(this);
        super.onStop();
    }

    @Override
    public void changed(Status status) {}

    @Override
    public boolean onOptionsItemSelected(MenuItem item) {
        if (item.getItemId() == android.R.id.home) {
            finish();
            return true;
        }
        return super.onOptionsItemSelected(item);
    }

    /** Adds a row and returns it. */
    protected View add(int layout) {
        View row = getLayoutInflater().inflate(layout, content, false);
        content.addView(row);
        return row;
    }

    /** Adds a labelled value. */
    protected void addFact(int label, String value) {
        View row = add(R.layout.fact);
        set(row, R.id.label, words.text(label));
        set(row, R.id.value, value);
    }

    /** Asks another app for something, and says so where there is none that could. */
    protected void startForResult(Intent asked, int request) {
        try {
            startActivityForResult(asked, request);
        } catch (ActivityNotFoundException error) {
            Toast.makeText(this, R.string.no_picker, Toast.LENGTH_LONG).show();
        }
    }

    /** Adds a text without a label. */
    protected void addNote(String text) {
        View row = add(R.layout.fact);
        set(row, R.id.label, "");
        set(row, R.id.value, text);
    }

    /** Adds the button for what this screen is there for. */
    protected Button addMainButton(View.OnClickListener clicked) {
        var button = new Button(this, null, 0, R.style.Strong);
        button.setGravity(Gravity.CENTER);
        button.setOnClickListener(clicked);
        var place = new LinearLayout.LayoutParams(LinearLayout.LayoutParams.MATCH_PARENT, LinearLayout.LayoutParams.WRAP_CONTENT);
        int gap = getResources().getDimensionPixelSize(R.dimen.gap);
        place.setMargins(0, gap, 0, gap);
        content.addView(button, place);
        return button;
    }

    /** Sets a text, and hides the view where there is none. */
    static void set(View parent, int id, String value) {
        TextView view = parent.findViewById(id);
        if (!value.contentEquals(view.getText())) {
            view.setText(value);
        }
        view.setVisibility(value.isEmpty() ? View.GONE : View.VISIBLE);
    }
}
