package org.cdcda.app.engine;

import java.io.Closeable;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;

/** How a unix socket is reached: Android's LocalSocket on a phone, java.nio on a JVM. */
public interface Transport {

    /** An open connection; closing it from another thread ends a read. */
    interface Connection extends Closeable {
        /** Lets a read fail after so many milliseconds without a byte. */
        void setPatience(int millis) throws IOException;

        InputStream in() throws IOException;

        /** Returns where to write; nothing is kept back until a flush. */
        OutputStream out() throws IOException;
    }

    /** Opens a connection to a socket in the file system. */
    Connection open(File socket) throws IOException;
}
