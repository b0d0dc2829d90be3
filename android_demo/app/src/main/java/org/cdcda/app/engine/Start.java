package org.cdcda.app.engine;

import java.io.File;

/**
 * What to load and how.
 *
 * @param model the GGUF file
 * @param adapter a LoRA adapter that is applied at run time, or null where the model is merged
 * @param context tokens of prompt and answer together
 * @param threads that compute
 * @param cores the cores they run on as a bit mask; 0 leaves that to the system
 */
public record Start(File model, File adapter, int context, int threads, long cores) {}
