package org.cdcda.app.model;

import java.util.ArrayList;
import java.util.Collections;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import org.json.JSONArray;
import org.json.JSONException;
import org.json.JSONObject;

/**
 * What bundle.json says of a model. The exporter writes it ({@code cdcda_export/bundle.py}); tests/data/bundle.json is read by the tests of
 * both sides.
 *
 * @param format gguf, or gguf-lora where base and adapter are two files
 * @param quant quantization of the weights
 * @param files role (model, adapter) to file
 * @param baseName the model it was made from
 * @param baseLicence of that
 * @param contextLength tokens of prompt and answer that the memory is computed for
 * @param memoryBytes that it takes with this context
 * @param cacheBytesPerToken what one more token of context takes
 * @param presets the tasks it was trained for
 * @param records real ones that it learned from, or UNKNOWN
 * @param synthetic ones that a teacher wrote, or UNKNOWN
 * @param checks how the quantized model was compared with the one before
 * @param licences the file with the licences
 */
public record Bundle(
        String format,
        String quant,
        Map<String, Part> files,
        String baseName,
        String baseLicence,
        int contextLength,
        long memoryBytes,
        long cacheBytesPerToken,
        List<Preset> presets,
        int records,
        int synthetic,
        Checks checks,
        String licences) {

    public static final int SCHEMA = 3;
    public static final int UNKNOWN = -1;
    public static final String FILE = "bundle.json";
    public static final String MODEL = "model";
    public static final String ADAPTER = "adapter";

    /** A file of the bundle. */
    public record Part(String name, long bytes, String sha256) {}

    /** A task: its name, and the instruction with {input} where the user's text goes. */
    public record Preset(String task, String instruction) {
        private static final String INPUT = "{input}";

        /** Returns what the model is asked. */
        public String asked(String text) {
            return instruction.replace(INPUT, text.trim());
        }
    }

    /**
     * The gate that the artifact passed.
     *
     * @param kl divergence from the model before quantization, in nats
     * @param klGate the most that was allowed
     * @param top1 share of equal first choices
     * @param top1Gate the least that was allowed
     */
    public record Checks(double kl, double klGate, double top1, double top1Gate) {}

    /** Reads a bundle. */
    public static Bundle parse(String json) throws BundleException {
        JSONObject whole;
        try {
            whole = new JSONObject(json);
        } catch (JSONException error) {
            throw new BundleException(BundleException.Problem.UNREADABLE, String.valueOf(error.getMessage()));
        }
        int schema = whole.optInt("schema");
        if (schema != SCHEMA) {
            throw new BundleException(BundleException.Problem.OTHER_VERSION, String.valueOf(schema));
        }
        String format = whole.optString("format");
        if (!format.equals("gguf") && !format.equals("gguf-lora")) {
            throw new BundleException(BundleException.Problem.NOT_GGUF, format);
        }
        try {
            Bundle bundle = read(whole, format);
            JSONObject verification = whole.getJSONObject("verification");
            if (!verification.getString("level").equals("full") || !verification.optBoolean("passed")) {
                throw new BundleException(BundleException.Problem.NOT_VERIFIED, verification.getString("level"));
            }
            return bundle;
        } catch (JSONException error) {
            throw new BundleException(BundleException.Problem.UNREADABLE, String.valueOf(error.getMessage()));
        }
    }

    private static Bundle read(JSONObject whole, String format) throws JSONException, BundleException {
        Map<String, Part> files = new LinkedHashMap<>();
        JSONObject listed = whole.getJSONObject("files");
        for (Iterator<String> roles = listed.keys(); roles.hasNext(); ) {
            String role = roles.next();
            JSONObject file = listed.getJSONObject(role);
            files.put(role, new Part(plainName(file.getString("file")), file.getLong("bytes"), file.getString("sha256")));
        }
        if (!files.containsKey(MODEL) || format.equals("gguf-lora") != files.containsKey(ADAPTER)) {
            throw new BundleException(BundleException.Problem.UNREADABLE, "files");
        }
        List<Preset> presets = new ArrayList<>();
        JSONArray tasks = whole.getJSONArray("presets");
        for (int at = 0; at < tasks.length(); at++) {
            presets.add(new Preset(tasks.getJSONObject(at).getString("task"), tasks.getJSONObject(at).getString("instruction")));
        }
        JSONObject base = whole.getJSONObject("base");
        JSONObject learned = whole.optJSONObject("learned_from"); // null for an adapter from elsewhere
        JSONObject gate = whole.getJSONObject("verification");
        return new Bundle(
                format,
                whole.getString("quant"),
                Collections.unmodifiableMap(files), // in their order
                base.getString("name"),
                base.getString("license"),
                whole.getInt("context_length"),
                whole.getLong("memory_bytes"),
                whole.getLong("cache_bytes_per_token"),
                List.copyOf(presets),
                learned == null ? UNKNOWN : learned.getInt("records"),
                learned == null ? UNKNOWN : learned.getInt("synthetic"),
                new Checks(gate.optDouble("kl_mean"), gate.optDouble("kl_gate"), gate.optDouble("top1"), gate.optDouble("top1_gate")),
                plainName(whole.getString("licences")));
    }

    /** Returns a file's name, and refuses one that would lead out of the bundle's folder. */
    private static String plainName(String name) throws BundleException {
        if (name.isEmpty() || name.contains("/") || name.contains("\\") || name.startsWith(".")) {
            throw new BundleException(BundleException.Problem.UNREADABLE, name);
        }
        return name;
    }

    /** Whether base and person can be compared in one model. */
    public boolean canCompare() {
        return files.containsKey(ADAPTER);
    }

    /** Bytes of all files. */
    public long bytes() {
        long sum = 0;
        for (Part part : files.values()) {
            sum += part.bytes();
        }
        return sum;
    }

    /** Bytes of memory with another context. */
    public long memoryFor(int context) {
        return memoryBytes + (context - contextLength) * cacheBytesPerToken;
    }
}
