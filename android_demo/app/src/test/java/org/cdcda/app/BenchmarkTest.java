package org.cdcda.app;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;

import java.io.File;
import org.cdcda.app.Fakes.FakeDevice;
import org.cdcda.app.Fakes.FakeEngine;
import org.cdcda.app.Fakes.FakePackage;
import org.cdcda.app.Fakes.FakeSettings;
import org.cdcda.app.engine.Answer.Timings;
import org.cdcda.app.model.ModelStore;
import org.json.JSONObject;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

/** What the benchmark says of what it measured. */
public class BenchmarkTest {
    @Rule
    public final TemporaryFolder folder = new TemporaryFolder();

    @Test
    public void mediansEnduranceAndAReportWithoutAText() throws Exception {
        var engine = new FakeEngine();
        var store = new ModelStore(new File(folder.getRoot(), "own"), null);
        var session = new Session(store, new FakePackage(true), engine, new FakeDevice(), new FakeSettings(), Runnable::run, Runnable::run);
        session.open();
        var benchmark = new Benchmark(session);
        benchmark.run(2);
        assertTrue(benchmark.isRunning());
        for (double speed : new double[] {40, 36, 38, 30}) {
            engine.meter.measured(new Timings(256, 10 * speed, 64, speed));
        }
        assertFalse(benchmark.isCut());
        engine.meter.done(true, "");
        assertFalse(benchmark.isRunning() || benchmark.isCut());
        assertEquals(38, benchmark.median(false), 0);
        assertEquals(380, benchmark.median(true), 0);
        assertEquals(0.75, benchmark.endurance(), 0);
        JSONObject report = new JSONObject(benchmark.json());
        assertEquals("Maker Phone", report.getString("phone"));
        assertEquals(4, report.getJSONArray("decode_tokens_per_second").length());
        assertEquals(2, report.getInt("threads"));
        assertEquals("q8_0", report.getString("quant"));
        assertTrue(report.getBoolean("complete"));
        for (String role : new String[] {"model", "adapter"}) {
            String hash = session.status().model().bundle().files().get(role).sha256();
            assertEquals(hash, report.getString(role.equals("model") ? "sha256" : "adapter_sha256"));
        }
        benchmark.run(2);
        engine.meter.measured(new Timings(256, 400, 64, 40));
        engine.meter.done(false, "");
        assertTrue(benchmark.isCut());
        assertFalse(new JSONObject(benchmark.json()).getBoolean("complete"));
        benchmark.run(0);
        engine.meter.done(false, "the engine closed the connection");
        assertEquals("the engine closed the connection", benchmark.failure());
        assertFalse(benchmark.isCut());
        assertEquals(0, benchmark.measured().size());
    }
}
