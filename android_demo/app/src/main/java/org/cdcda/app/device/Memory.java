package org.cdcda.app.device;

/**
 * Whether a model goes into the memory that an app may take: the smaller of 60 % of the RAM and the RAM less 1.2 GB, as in
 * {@code cdcda_mobile/phone/classes.py}. Android documents no limit; beyond this one its low-memory killer is near.
 */
public final class Memory {
    private static final double SHARE = 0.6;
    private static final long SYSTEM = 1_200_000_000;
    private static final double TIGHT = 0.9;

    /** How it goes in. */
    public enum Verdict {
        FITS,
        TIGHT,
        DOES_NOT_FIT
    }

    private Memory() {}

    /** Returns what an app may take of so much memory, in bytes. */
    public static long budget(long memory) {
        return Math.max(0, Math.min((long) (SHARE * memory), memory - SYSTEM));
    }

    /** Says whether so many bytes go in. */
    public static Verdict verdict(long needed, long memory) {
        long budget = budget(memory);
        return needed > budget ? Verdict.DOES_NOT_FIT : needed > TIGHT * budget ? Verdict.TIGHT : Verdict.FITS;
    }
}
