package org.cdcda.app.device;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;

/**
 * Which build of the engine this processor runs, and on which of its cores. The same rules as {@code cdcda_engine/variants.py} and
 * {@code cdcda_mobile/phone/device.py}; tests/data/processors.json holds both to the same answers.
 */
public final class Cpu {

    /**
     * A core.
     *
     * @param number as the kernel counts
     * @param khz its highest clock, 0 where it does not say
     * @param part the part number in /proc/cpuinfo, "" where it is off
     */
    public record Core(int number, long khz, String part) {}

    private record Variant(String name, String abi, Set<String> features) {}

    private static final Set<String> DOTPROD = Set.of("asimddp", "asimdhp");
    /** From the most able to the plainest of each instruction set: the first that fits is the fastest. */
    private static final List<Variant> VARIANTS = List.of(
            new Variant("arm64-i8mm", "arm64-v8a", Set.of("asimddp", "asimdhp", "i8mm")),
            new Variant("arm64-dotprod", "arm64-v8a", DOTPROD),
            new Variant("arm64-v8", "arm64-v8a", Set.of()),
            new Variant("x86_64", "x86_64", Set.of()));
    /** Efficiency cores: Cortex-A53, A55, A510, A520; Qualcomm's Kryo 2xx, 3xx and 4xx Silver. A thread there makes the others wait. */
    private static final Set<String> LITTLE = Set.of("0xd03", "0xd05", "0xd46", "0xd80", "0x801", "0x803", "0x805");
    private static final double SLOW = 0.7;
    private static final int FEW = 4;

    private Cpu() {}

    /** Returns the name of the fastest build for a processor, "" where there is none. */
    public static String variant(String abi, String cpuinfo) {
        Set<String> there = features(cpuinfo);
        for (Variant variant : VARIANTS) {
            if (variant.abi().equals(abi) && there.containsAll(variant.features())) {
                return variant.name();
            }
        }
        return "";
    }

    /** Returns what every core of a /proc/cpuinfo lists: threads move between cores. */
    static Set<String> features(String cpuinfo) {
        Set<String> common = null;
        for (String line : cpuinfo.split("\n")) {
            String[] parts = line.split(":", 2);
            if (parts.length == 2 && parts[0].trim().equals("Features")) {
                Set<String> mine = new HashSet<>(Arrays.asList(parts[1].trim().split("\\s+")));
                if (common == null) {
                    common = mine;
                } else {
                    common.retainAll(mine);
                }
            }
        }
        return common == null ? Set.of() : common;
    }

    /** Returns core to part number of a /proc/cpuinfo. */
    public static Map<Integer, String> parts(String cpuinfo) {
        Map<Integer, String> found = new HashMap<>();
        int number = -1;
        for (String line : cpuinfo.split("\n")) {
            String[] parts = line.split(":", 2);
            if (parts.length < 2) {
                continue;
            }
            String name = parts[0].trim();
            if (name.equals("processor")) {
                number = Integer.parseInt(parts[1].trim());
            } else if (name.equals("CPU part")) {
                found.put(number, parts[1].trim());
            }
        }
        return found;
    }

    /** Returns the cores that should compute, the fastest first: those that make nobody wait; where all are little, four of them. */
    public static List<Integer> bigCores(List<Core> cores) {
        List<Core> ordered = new ArrayList<>(cores);
        ordered.sort(Comparator.comparingLong((Core core) -> -core.khz()));
        long fastest = ordered.isEmpty() ? 0 : ordered.get(0).khz();
        List<Integer> big = new ArrayList<>();
        for (Core core : ordered) {
            if (!LITTLE.contains(core.part()) && core.khz() >= SLOW * fastest) {
                big.add(core.number());
            }
        }
        if (big.isEmpty()) {
            for (Core core : ordered.subList(0, Math.min(FEW, ordered.size()))) {
                big.add(core.number());
            }
        }
        return big;
    }

    /** Returns cores as a bit mask. */
    public static long mask(List<Integer> cores) {
        long mask = 0;
        for (int core : cores) {
            mask |= 1L << core;
        }
        return mask;
    }
}
