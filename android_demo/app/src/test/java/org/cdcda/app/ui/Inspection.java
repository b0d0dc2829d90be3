package org.cdcda.app.ui;

import android.app.Activity;
import android.graphics.Bitmap;
import android.graphics.Canvas;
import android.graphics.Color;
import android.graphics.Rect;
import android.text.Layout;
import android.view.View;
import android.view.ViewGroup;
import android.widget.CompoundButton;
import android.widget.EditText;
import android.widget.ScrollView;
import android.widget.TextView;
import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** Looks at a screen as its users have to: is every text whole, readable and reachable? */
final class Inspection {
    private static final double LEAST_CONTRAST = 4.5;
    private static final int LEAST_TOUCH_DP = 48;

    private final List<String> complaints = new ArrayList<>();
    private final ViewGroup decor;
    private final Bitmap picture;
    private final float density;

    private Inspection(ViewGroup decor, Bitmap picture, float density) {
        this.decor = decor;
        this.picture = picture;
        this.density = density;
    }

    /** Draws a screen into target/screenshots, with what is below the fold, and returns what is wrong with it. */
    static List<String> of(Activity activity, String name) {
        var decor = (ViewGroup) activity.getWindow().getDecorView();
        int height = decor.getHeight();
        lay(decor, height);
        lay(decor, height + belowTheFold(decor));
        Bitmap picture = Bitmap.createBitmap(decor.getWidth(), decor.getHeight(), Bitmap.Config.ARGB_8888);
        decor.draw(new Canvas(picture));
        save(picture, name);
        var inspection = new Inspection(decor, picture, activity.getResources().getDisplayMetrics().density);
        View content = activity.findViewById(android.R.id.content);
        inspection.look(content);
        lay(decor, height);
        return inspection.complaints;
    }

    private static void lay(View decor, int height) {
        decor.measure(
                View.MeasureSpec.makeMeasureSpec(decor.getWidth(), View.MeasureSpec.EXACTLY),
                View.MeasureSpec.makeMeasureSpec(height, View.MeasureSpec.EXACTLY));
        decor.layout(0, 0, decor.getWidth(), height);
    }

    /** Returns how much higher a screen has to be for everything to be seen at once. */
    private static int belowTheFold(View view) {
        if (view instanceof ScrollView scroll) {
            scroll.scrollTo(0, 0);
            int inside = scroll.getHeight() - scroll.getPaddingTop() - scroll.getPaddingBottom();
            return Math.max(0, scroll.getChildAt(0).getHeight() - inside);
        }
        int most = 0;
        if (view instanceof ViewGroup group) {
            for (int at = 0; at < group.getChildCount(); at++) {
                most = Math.max(most, belowTheFold(group.getChildAt(at)));
            }
        }
        return most;
    }

    private static void save(Bitmap picture, String name) {
        File folder = new File(System.getProperty("screenshots", "target/screenshots"));
        folder.mkdirs();
        try (var out = new FileOutputStream(new File(folder, name + ".png"))) {
            picture.compress(Bitmap.CompressFormat.PNG, 100, out);
        } catch (IOException error) {
            throw new IllegalStateException(error);
        }
    }

    private void look(View view) {
        if (view.getVisibility() != View.VISIBLE) {
            return;
        }
        if (view instanceof TextView text && text.length() > 0) {
            lookAtText(text);
        }
        if (view.isClickable() && view.isEnabled() && !(view instanceof TextView text && text.isTextSelectable())) {
            lookAtTouch(view);
        }
        if (view instanceof ViewGroup group) {
            for (int at = 0; at < group.getChildCount(); at++) {
                View child = group.getChildAt(at);
                if (child.getVisibility() == View.VISIBLE && (child.getLeft() < 0 || child.getRight() > group.getWidth())) {
                    complaints.add(told(child) + " reaches out of the screen");
                }
                look(child);
            }
        }
    }

    private void lookAtText(TextView text) {
        Layout layout = text.getLayout();
        if (layout == null) {
            complaints.add(told(text) + " was not laid out");
            return;
        }
        int inside = text.getWidth() - text.getCompoundPaddingLeft() - text.getCompoundPaddingRight();
        for (int line = 0; line < layout.getLineCount(); line++) {
            if (layout.getEllipsisCount(line) > 0) {
                complaints.add(told(text) + " is shortened");
            }
            boolean isOneWord = text instanceof EditText;
            if (!isOneWord && layout.getLineMax(line) > inside + 1) {
                complaints.add(told(text) + " is wider than its place");
            }
        }
        int height = layout.getHeight() + text.getCompoundPaddingTop() + text.getCompoundPaddingBottom();
        if (!(text instanceof EditText) && height > text.getHeight() + 1) {
            complaints.add(told(text) + " is cut off below");
        }
        if (text.isEnabled()) {
            lookAtContrast(text);
        }
    }

    /** The picture knows what is behind a text: the colour that most of its place has. */
    private void lookAtContrast(TextView text) {
        var seen = new Rect(0, 0, text.getWidth(), text.getHeight());
        decor.offsetDescendantRectToMyCoords(text, seen);
        if (!new Rect(0, 0, picture.getWidth(), picture.getHeight()).contains(seen)) {
            complaints.add(told(text) + " cannot be scrolled to");
            return;
        }
        Map<Integer, Integer> colours = new HashMap<>();
        for (int y = seen.top; y < seen.bottom; y += 2) {
            for (int x = seen.left; x < seen.right; x += 2) {
                colours.merge(picture.getPixel(x, y), 1, Integer::sum);
            }
        }
        int behind = Collections.max(colours.entrySet(), Map.Entry.comparingByValue()).getKey();
        double contrast = contrast(text.getCurrentTextColor(), behind);
        if (contrast < LEAST_CONTRAST) {
            complaints.add(told(text) + " has a contrast of " + contrast);
        }
    }

    private void lookAtTouch(View view) {
        float width = view.getWidth() / density;
        float height = view.getHeight() / density;
        if (width < LEAST_TOUCH_DP - 0.5 || height < LEAST_TOUCH_DP - 0.5) {
            complaints.add(told(view) + " is " + width + " by " + height + " dp");
        }
        boolean isNamed = view.getContentDescription() != null || view instanceof TextView text && (text.length() > 0 || isLabelled(text));
        if (!isNamed && !(view instanceof CompoundButton) && !isLabelled(view)) {
            complaints.add(told(view) + " has no name for a screen reader");
        }
    }

    private static boolean isLabelled(View view) {
        return isLabelled(view.getRootView(), view.getId());
    }

    private static boolean isLabelled(View where, int id) {
        if (where.getLabelFor() == id && id != View.NO_ID) {
            return true;
        }
        if (where instanceof ViewGroup group) {
            for (int at = 0; at < group.getChildCount(); at++) {
                if (isLabelled(group.getChildAt(at), id)) {
                    return true;
                }
            }
        }
        return false;
    }

    private static double contrast(int one, int other) {
        double a = luminance(one);
        double b = luminance(other);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }

    private static double luminance(int colour) {
        return Color.luminance(colour);
    }

    private String told(View view) {
        String name = view.getId() == View.NO_ID ? view.getClass().getSimpleName() : view.getResources().getResourceEntryName(view.getId());
        return view instanceof TextView text ? name + " '" + text.getText() + "'" : name;
    }
}
