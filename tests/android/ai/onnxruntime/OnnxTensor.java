package ai.onnxruntime;

import java.nio.Buffer;
import java.nio.FloatBuffer;
import java.nio.IntBuffer;
import java.nio.LongBuffer;

public class OnnxTensor implements OnnxValue {
    final Buffer data;
    final long[] shape;

    private OnnxTensor(Buffer data, long[] shape) {
        this.data = data;
        this.shape = shape;
    }

    public static OnnxTensor createTensor(OrtEnvironment env, FloatBuffer data, long[] shape) throws OrtException {
        return new OnnxTensor(data, shape);
    }

    public static OnnxTensor createTensor(OrtEnvironment env, IntBuffer data, long[] shape) throws OrtException {
        return new OnnxTensor(data, shape);
    }

    public static OnnxTensor createTensor(OrtEnvironment env, LongBuffer data, long[] shape) throws OrtException {
        return new OnnxTensor(data, shape);
    }

    public FloatBuffer getFloatBuffer() {
        return ((FloatBuffer) data).duplicate();
    }

    @Override
    public void close() {}
}
