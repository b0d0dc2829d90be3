package org.cdcda.app.device;

import static org.junit.Assert.assertEquals;

import java.util.ArrayList;
import java.util.List;
import org.cdcda.app.Shared;
import org.json.JSONArray;
import org.json.JSONObject;
import org.junit.Test;

/** The rules about processors, which Python has too. */
public class CpuTest {
    @Test
    public void aPhoneGetsTheBuildThatAllItsCoresCanRun() throws Exception {
        JSONArray cases = new JSONObject(Shared.read("processors.json")).getJSONArray("variants");
        for (int at = 0; at < cases.length(); at++) {
            JSONObject one = cases.getJSONObject(at);
            assertEquals(one.toString(), one.getString("variant"), Cpu.variant(one.getString("abi"), one.getString("cpuinfo")));
        }
    }

    @Test
    public void theBigCoresAreThoseThatMakeNobodyWait() throws Exception {
        JSONArray cases = new JSONObject(Shared.read("processors.json")).getJSONArray("cores");
        for (int at = 0; at < cases.length(); at++) {
            JSONObject one = cases.getJSONObject(at);
            List<Cpu.Core> cores = new ArrayList<>();
            for (int core = 0; core < one.getJSONArray("cores").length(); core++) {
                JSONArray row = one.getJSONArray("cores").getJSONArray(core);
                cores.add(new Cpu.Core(row.getInt(0), row.getLong(1), row.getString(2)));
            }
            assertEquals(one.getJSONArray("big").toString(), new JSONArray(Cpu.bigCores(cores)).toString());
        }
        assertEquals(0b110, Cpu.mask(List.of(2, 1)));
    }

    @Test
    public void partsStandWithTheirProcessor() {
        assertEquals("0xd4e", Cpu.parts("processor\t: 0\nCPU part\t: 0xd05\n\nprocessor\t: 7\nCPU part\t: 0xd4e\n").get(7));
    }

    @Test
    public void anAppMayTakeSixtyPerCentOrLess() {
        long gigabyte = 1_000_000_000;
        assertEquals(800_000_000, Memory.budget(2 * gigabyte));
        assertEquals(4_800_000_000L, Memory.budget(8 * gigabyte));
        assertEquals(0, Memory.budget(gigabyte));
        assertEquals(Memory.Verdict.FITS, Memory.verdict(700_000_000, 2 * gigabyte));
        assertEquals(Memory.Verdict.TIGHT, Memory.verdict(750_000_000, 2 * gigabyte));
        assertEquals(Memory.Verdict.DOES_NOT_FIT, Memory.verdict(900_000_000, 2 * gigabyte));
    }
}
