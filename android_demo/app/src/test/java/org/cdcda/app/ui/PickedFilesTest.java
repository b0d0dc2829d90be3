package org.cdcda.app.ui;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThrows;

import android.content.ClipData;
import android.content.ContentProvider;
import android.content.ContentValues;
import android.content.Context;
import android.content.Intent;
import android.database.Cursor;
import android.database.MatrixCursor;
import android.net.Uri;
import android.provider.OpenableColumns;
import java.io.ByteArrayInputStream;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import org.cdcda.app.model.ModelStore;
import org.junit.Before;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.Robolectric;
import org.robolectric.RobolectricTestRunner;
import org.robolectric.RuntimeEnvironment;
import org.robolectric.Shadows;
import org.robolectric.annotation.Config;

/** Files of another app, which may throw at any time. */
@RunWith(RobolectricTestRunner.class)
@Config(sdk = 34, application = TestApp.class)
public class PickedFilesTest {
    static final String FILES = "org.example.files";

    private final Context context = RuntimeEnvironment.getApplication();
    private final Intent picked = new Intent();

    /** Names a file by the last part of its address, once it may. */
    public static final class Files extends ContentProvider {
        static boolean isLocked;

        @Override
        public boolean onCreate() {
            return true;
        }

        @Override
        public Cursor query(Uri uri, String[] columns, String where, String[] values, String order) {
            if (isLocked && uri.getLastPathSegment().equals("model.gguf")) {
                throw new SecurityException("locked");
            }
            var rows = new MatrixCursor(new String[] {OpenableColumns.DISPLAY_NAME});
            rows.addRow(new Object[] {uri.getLastPathSegment()});
            return rows;
        }

        @Override
        public String getType(Uri uri) {
            return null;
        }

        @Override
        public Uri insert(Uri uri, ContentValues values) {
            return null;
        }

        @Override
        public int delete(Uri uri, String where, String[] values) {
            return 0;
        }

        @Override
        public int update(Uri uri, ContentValues values, String where, String[] arguments) {
            return 0;
        }
    }

    @Before
    public void pick() {
        Robolectric.setupContentProvider(Files.class, FILES);
        Files.isLocked = false;
        for (String name : new String[] {"bundle.json", "model.gguf"}) {
            Uri uri = Uri.parse("content://" + FILES + "/" + name);
            byte[] content = ("of " + name).getBytes(StandardCharsets.UTF_8);
            Shadows.shadowOf(context.getContentResolver()).registerInputStreamSupplier(uri, () -> new ByteArrayInputStream(content));
            var item = new ClipData.Item(uri);
            if (picked.getClipData() == null) {
                picked.setClipData(new ClipData("", new String[] {"*/*"}, item));
            } else {
                picked.getClipData().addItem(item);
            }
        }
    }

    @Test
    public void theyAreFoundByTheirNamesAndGoOnWhereTheyWere() throws Exception {
        var files = new PickedFiles(context, picked);
        assertEquals("of bundle.json", ModelStore.text(files.open("bundle.json", 0)));
        assertEquals("model.gguf", ModelStore.text(files.open("model.gguf", 3)));
        assertThrows(FileNotFoundException.class, () -> files.open("adapter.gguf", 0));
        assertThrows(IOException.class, () -> files.open("model.gguf", 100));
    }

    @Test
    public void whatTheirAppRefusedOnceIsAskedAgain() throws Exception {
        var files = new PickedFiles(context, picked);
        Files.isLocked = true;
        assertEquals("locked", assertThrows(IOException.class, () -> files.open("bundle.json", 0)).getMessage());
        Files.isLocked = false;
        assertEquals("of bundle.json", ModelStore.text(files.open("bundle.json", 0)));
        assertEquals("of model.gguf", ModelStore.text(files.open("model.gguf", 0)));
    }
}
