package org.cdcda.app.engine;

import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.StandardProtocolFamily;
import java.net.UnixDomainSocketAddress;
import java.nio.channels.Channels;
import java.nio.channels.SocketChannel;

/** Unix sockets as the JVM has them. */
public final class JvmTransport implements Transport {
    @Override
    public Connection open(File socket) throws IOException {
        SocketChannel channel = SocketChannel.open(StandardProtocolFamily.UNIX);
        try {
            channel.connect(UnixDomainSocketAddress.of(socket.toPath()));
        } catch (IOException error) {
            channel.close();
            throw error;
        }
        InputStream in = Channels.newInputStream(channel);
        OutputStream out = Channels.newOutputStream(channel);
        return new Connection() {
            @Override
            public void setPatience(int millis) {
                // A channel has no such thing; the engines of tests answer.
            }

            @Override
            public InputStream in() {
                return in;
            }

            @Override
            public OutputStream out() {
                return out;
            }

            @Override
            public void close() throws IOException {
                channel.close();
            }
        };
    }
}
