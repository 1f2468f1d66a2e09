package ai.onnxruntime;

import java.nio.FloatBuffer;
import java.nio.IntBuffer;
import java.nio.LongBuffer;
import java.util.Map;

/** A session whose network is x / 2 + class / 4 + step / 8: enough to tell whether everything arrives where it should. */
public class OrtSession implements AutoCloseable {
    OrtSession() {}

    public Result run(Map<String, ? extends OnnxTensor> inputs) throws OrtException {
        OnnxTensor sample = inputs.get("sample");
        FloatBuffer given = sample.getFloatBuffer();
        int batch = (int) sample.shape[0];
        int size = given.remaining() / batch;
        float[] made = new float[batch * size];
        for (int at = 0; at < made.length; at++) {
            float step = ((IntBuffer) inputs.get("step_index").data).get(at / size);
            OnnxTensor classes = inputs.get("class_index");
            float label = classes == null ? 0 : ((LongBuffer) classes.data).get(at / size);
            made[at] = given.get(at) / 2 + label / 4 + step / 8;
        }
        return new Result(OnnxTensor.createTensor(null, FloatBuffer.wrap(made), sample.shape));
    }

    @Override
    public void close() throws OrtException {}

    public static class SessionOptions implements AutoCloseable {
        public void setIntraOpNumThreads(int threads) throws OrtException {}

        public void addConfigEntry(String key, String value) throws OrtException {}

        @Override
        public void close() {}
    }

    public static class Result implements AutoCloseable {
        private final OnnxValue only;

        Result(OnnxValue only) {
            this.only = only;
        }

        public OnnxValue get(int index) {
            return only;
        }

        @Override
        public void close() {}
    }
}
