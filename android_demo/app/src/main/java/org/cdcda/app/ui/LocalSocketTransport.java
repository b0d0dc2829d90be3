package org.cdcda.app.ui;

import android.net.LocalSocket;
import android.net.LocalSocketAddress;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import org.cdcda.app.engine.Transport;

/** Unix sockets as Android has them. */
final class LocalSocketTransport implements Transport {

    @Override
    public Connection open(File socket) throws IOException {
        var local = new LocalSocket();
        try {
            local.connect(new LocalSocketAddress(socket.getPath(), LocalSocketAddress.Namespace.FILESYSTEM));
        } catch (IOException error) {
            local.close();
            throw error;
        }
        return new Connection() {
            @Override
            public void setPatience(int millis) throws IOException {
                local.setSoTimeout(millis);
            }

            @Override
            public InputStream in() throws IOException {
                return local.getInputStream();
            }

            @Override
            public OutputStream out() throws IOException {
                return local.getOutputStream();
            }

            @Override
            public void close() throws IOException {
                try {
                    local.shutdownInput(); // closing alone does not wake a thread that reads
                    local.shutdownOutput();
                } catch (IOException error) {
                    // The engine was first.
                }
                local.close();
            }
        };
    }
}
