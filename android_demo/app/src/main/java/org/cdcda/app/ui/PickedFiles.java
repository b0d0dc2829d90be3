package org.cdcda.app.ui;

import android.content.ContentResolver;
import android.content.Context;
import android.content.Intent;
import android.database.Cursor;
import android.net.Uri;
import android.provider.OpenableColumns;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.io.InputStream;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import org.cdcda.app.model.ModelStore;

/** Files that the user picked, by their names. They can be read after the screen is gone on which they were picked. */
final class PickedFiles implements ModelStore.Source {
    private final ContentResolver resolver;
    private final List<Uri> picked = new ArrayList<>();
    private Map<String, Uri> names;

    PickedFiles(Context context, Intent result) {
        resolver = context.getApplicationContext().getContentResolver();
        if (result.getClipData() != null) {
            for (int at = 0; at < result.getClipData().getItemCount(); at++) {
                keep(result.getClipData().getItemAt(at).getUri());
            }
        } else if (result.getData() != null) {
            keep(result.getData());
        }
    }

    private void keep(Uri uri) {
        picked.add(uri);
        try {
            resolver.takePersistableUriPermission(uri, Intent.FLAG_GRANT_READ_URI_PERMISSION);
        } catch (SecurityException error) {
            // Some providers lend a file for as long as the screen is there; that may be enough.
        }
    }

    /** Returns the files by name; asks their providers, so it is not for the main thread. */
    private synchronized Map<String, Uri> names() {
        if (names == null) {
            Map<String, Uri> found = new HashMap<>();
            for (Uri uri : picked) {
                try (Cursor row = resolver.query(uri, new String[] {OpenableColumns.DISPLAY_NAME}, null, null, null)) {
                    if (row != null && row.moveToFirst() && row.getString(0) != null) {
                        found.put(row.getString(0), uri);
                    }
                }
            }
            names = found; // all of them: a provider that throws is asked again
        }
        return names;
    }

    @Override
    public InputStream open(String name, long skipped) throws IOException {
        InputStream in;
        try {
            Uri uri = names().get(name);
            in = uri == null ? null : resolver.openInputStream(uri);
        } catch (RuntimeException error) { // whatever another app's provider throws
            throw new IOException(String.valueOf(error.getMessage()), error);
        }
        if (in == null) {
            throw new FileNotFoundException(name);
        }
        byte[] over = new byte[1 << 16];
        for (long left = skipped; left > 0; ) {
            int got = in.read(over, 0, (int) Math.min(over.length, left));
            if (got < 0) {
                in.close();
                throw new IOException(name + " is shorter than it was");
            }
            left -= got;
        }
        return in;
    }
}
