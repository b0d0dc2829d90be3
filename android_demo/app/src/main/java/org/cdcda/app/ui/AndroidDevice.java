package org.cdcda.app.ui;

import android.app.ActivityManager;
import android.content.Context;
import android.os.Build;
import java.io.File;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.cdcda.app.device.Cpu;
import org.cdcda.app.device.Device;

/** The phone that the app runs on. */
final class AndroidDevice implements Device {
    private static final File CORES = new File("/sys/devices/system/cpu");

    private final long memory;

    AndroidDevice(Context context) {
        var info = new ActivityManager.MemoryInfo();
        context.getSystemService(ActivityManager.class).getMemoryInfo(info);
        memory = info.totalMem;
    }

    @Override
    public String abi() {
        return Build.SUPPORTED_ABIS.length == 0 ? "" : Build.SUPPORTED_ABIS[0];
    }

    @Override
    public String cpuinfo() {
        return read(new File("/proc/cpuinfo"));
    }

    @Override
    public List<Cpu.Core> cores() {
        Map<Integer, String> parts = Cpu.parts(cpuinfo());
        List<Cpu.Core> found = new ArrayList<>();
        for (int number = 0; new File(CORES, "cpu" + number).isDirectory(); number++) {
            String khz = read(new File(CORES, "cpu" + number + "/cpufreq/cpuinfo_max_freq")).trim();
            found.add(new Cpu.Core(number, khz.matches("\\d+") ? Long.parseLong(khz) : 0, parts.getOrDefault(number, "")));
        }
        return found;
    }

    @Override
    public long memory() {
        return memory;
    }

    @Override
    public String name() {
        return Build.MANUFACTURER + " " + Build.MODEL;
    }

    private static String read(File file) {
        try {
            return new String(Files.readAllBytes(file.toPath()), StandardCharsets.UTF_8);
        } catch (IOException error) {
            return "";
        }
    }
}
