package org.cdcda.app.model;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThrows;
import static org.junit.Assert.assertTrue;

import java.util.List;
import org.cdcda.app.Shared;
import org.cdcda.app.model.BundleException.Problem;
import org.json.JSONObject;
import org.junit.Test;

/** bundle.json as the exporter writes it. */
public class BundleTest {

    private static JSONObject whole() throws Exception {
        return new JSONObject(Shared.read("bundle.json"));
    }

    private static Problem problem(JSONObject json) {
        return assertThrows(BundleException.class, () -> Bundle.parse(json.toString())).problem();
    }

    @Test
    public void everythingIsRead() throws Exception {
        Bundle bundle = Bundle.parse(whole().toString());
        assertEquals("gguf-lora", bundle.format());
        assertEquals("q8_0", bundle.quant());
        assertEquals(new Bundle.Part("adapter.gguf", 9_800_000, "2".repeat(64)), bundle.files().get(Bundle.ADAPTER));
        assertEquals(List.of(Bundle.MODEL, Bundle.ADAPTER), List.copyOf(bundle.files().keySet()));
        assertEquals("SmolLM2 135M Instruct", bundle.baseName());
        assertEquals(21, bundle.records());
        assertEquals(24, bundle.synthetic());
        assertEquals(new Bundle.Checks(0.0062, 0.02, 0.934, 0.85), bundle.checks());
        assertEquals("Rewrite: a dog", bundle.presets().get(1).asked(" a dog "));
        assertEquals(154_611_072, bundle.bytes());
        assertEquals(200_000_000 - 1024 * 23040, bundle.memoryFor(1024));
        assertTrue(bundle.canCompare());
    }

    @Test
    public void anAdapterFromElsewhereHasLearnedFromNobodyKnownHere() throws Exception {
        assertEquals(Bundle.UNKNOWN, Bundle.parse(whole().put("learned_from", JSONObject.NULL).toString()).records());
    }

    @Test
    public void whatTheAppCannotRunIsNamed() throws Exception {
        assertEquals(Problem.NOT_GGUF, problem(whole().put("format", "onnx")));
        assertEquals(Problem.OTHER_VERSION, problem(whole().put("schema", 2)));
        JSONObject quick = whole();
        quick.getJSONObject("verification").put("level", "quick");
        assertEquals(Problem.NOT_VERIFIED, problem(quick));
        JSONObject failed = whole();
        failed.getJSONObject("verification").put("passed", false);
        assertEquals(Problem.NOT_VERIFIED, problem(failed));
    }

    @Test
    public void whatIsDamagedIsNamed() throws Exception {
        assertEquals(Problem.UNREADABLE, assertThrows(BundleException.class, () -> Bundle.parse("{")).problem());
        assertEquals(Problem.OTHER_VERSION, assertThrows(BundleException.class, () -> Bundle.parse("{}")).problem());
        for (String key : new String[] {"files", "base", "presets", "verification", "licences", "memory_bytes"}) {
            JSONObject json = whole();
            json.remove(key);
            assertEquals(key, Problem.UNREADABLE, problem(json));
        }
        JSONObject merged = whole().put("format", "gguf"); // which has no adapter
        assertEquals(Problem.UNREADABLE, problem(merged));
    }

    @Test
    public void aFileOutsideTheFolderIsRefused() throws Exception {
        for (String name : new String[] {"../x.gguf", "/etc/hosts", "a\\b", ".hidden", ""}) {
            JSONObject json = whole();
            json.getJSONObject("files").getJSONObject("model").put("file", name);
            assertEquals(name, Problem.UNREADABLE, problem(json));
        }
    }
}
