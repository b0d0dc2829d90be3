package org.cdcda.app.device;

import java.util.List;

/** What the app has to know of the phone. */
public interface Device {
    /** The instruction set, as Android names it. */
    String abi();

    /** /proc/cpuinfo. */
    String cpuinfo();

    /** The cores. */
    List<Cpu.Core> cores();

    /** All memory, in bytes. */
    long memory();

    /** What the model is called, for a benchmark's report. */
    String name();
}
